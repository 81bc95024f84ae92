"""Freed memory is kept, so that a large block comes without new pages once there was one; it is returned when asked."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from crossdock.parallel.memory import keep_freed_memory

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
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
        return list(map(int, done.stdout.split()))

    kept, returned = run("keep"), run("leave")
    assert 4 * kept[-1] < returned[-1]  # the second may not yet fit where the first was


RETURNED = """
from pathlib import Path
import torch
from crossdock.parallel.memory import keep_freed_memory, return_freed_memory

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
