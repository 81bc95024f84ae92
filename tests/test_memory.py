"""Weights move to huge pages with their values and addresses; freed memory is kept, and returned when asked."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossdock import memory
from crossdock.comm import LocalTransport
from crossdock.linear import can_pack, linear, pack
from crossdock.memory import use_huge_pages
from crossdock.moe import MoEConfig, MoELayer, experts

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
has_huge_pages = pytest.mark.skipif(
    not THP.is_file() or "[never]" in THP.read_text(), reason="this system has no transparent huge pages"
)

SCRIPT = """
import re, torch
from crossdock.memory import use_huge_pages

def on_huge_pages():
    return int(re.search(r"AnonHugePages: *(\\d+)", open("/proc/self/smaps_rollup").read())[1]) * 1024

before, weight = on_huge_pages(), torch.arange(4 << 20, dtype=torch.float32)
place = weight.data_ptr()
moved = use_huge_pages([weight])
assert torch.equal(weight, torch.arange(4 << 20, dtype=torch.float32)) and weight.data_ptr() == place
print(moved, on_huge_pages() - before)
"""


@has_huge_pages
def test_a_weight_moves_with_its_values() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    moved, grown = map(int, done.stdout.split())
    assert moved in (0, grown)  # none where the kernel has no free page, or cannot move to one
    if moved:
        assert 12 << 20 <= moved <= 16 << 20


@pytest.mark.skipif(not can_pack(torch.zeros(512, 512, dtype=torch.bfloat16)), reason="no bfloat16 in oneDNN")
def test_packed_weights_keep_their_values() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(768, 1024).to(torch.bfloat16) for _ in range(8)]
    packed, x_MK = [pack(weight) for weight in weights], torch.randn(4, 1024).to(torch.bfloat16)
    use_huge_pages([*packed, torch.empty(3, device="meta"), torch.empty(0)])
    for weight, moved in zip(weights, packed, strict=True):
        assert torch.equal(linear(x_MK, moved), linear(x_MK, weight))


KEPT = """
import resource, sys, torch
from crossdock.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_blocks_need_no_new_pages_after_a_while() -> None:
    def run(how: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True, check=True)
        return list(map(int, done.stdout.split()))

    kept, returned = run("keep"), run("leave")
    assert 4 * kept[-1] < returned[-1]  # the second may not yet fit where the first was


EQUAL = """
import torch
from crossdock.memory import keep_freed_memory

assert keep_freed_memory()
print(len({torch.empty(16 << 20, dtype=torch.uint8).data_ptr() for _ in range(50)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_equal_blocks_come_back_to_where_they_were() -> None:
    done = subprocess.run([sys.executable, "-c", EQUAL], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 3  # places


RETURNED = """
from pathlib import Path
import torch
from crossdock.memory import keep_freed_memory, return_freed_memory

def resident():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line).split()[1])

assert keep_freed_memory()
blocks = [torch.ones(32 << 20, dtype=torch.uint8) for _ in range(4)]
used = resident()
del blocks
kept = resident()
return_freed_memory()
print(used - kept, used - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_was_kept_is_returned_when_asked() -> None:
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    kept_kb, returned_kb = map(int, done.stdout.split())
    assert kept_kb < 16 << 10 and returned_kb > 112 << 10


def test_packed_experts_stand_on_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    monkeypatch.setattr(experts, "use_huge_pages", lambda tensors: moved.append(sum(1 for _ in tensors)))
    layer = MoELayer(MoEConfig(1024, 512, 4, 2), LocalTransport())
    layer.pack()
    assert moved == [8 if can_pack(torch.zeros(512, 512, dtype=torch.bfloat16)) else 2]


@has_huge_pages
def test_an_owner_who_has_switched_huge_pages_off_is_obeyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    monkeypatch.setattr(memory, "HUGE_PAGES", setting)
    weight = torch.zeros(4 << 20)
    for chosen in ("always madvise [never]\n", None):
        if chosen is None:
            setting.unlink()  # a kernel without them
        else:
            setting.write_text(chosen)
        assert use_huge_pages([weight]) == 0


@pytest.mark.parametrize(("free_kb", "is_low"), [(1000, True), (3000, False)])
def test_memory_is_low_where_little_of_it_can_be_had(
    free_kb: int, is_low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:  12000 kB\nMemAvailable:  {free_kb} kB\nHugePages_Total:  0\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_bytes() == free_kb << 10 and memory.memory_is_low() is is_low


def test_where_nobody_says_what_memory_there_is_it_suffices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "absent")
    assert memory.free_bytes() > 1 << 60 and not memory.memory_is_low()
