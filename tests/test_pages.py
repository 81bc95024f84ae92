"""Weights move to huge pages with their values and addresses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crossdock.linear import can_pack, linear, pack
from crossdock.pages import use_huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
has_huge_pages = pytest.mark.skipif(
    not THP.is_file() or "[never]" in THP.read_text(), reason="this system has no transparent huge pages"
)

SCRIPT = """
import re, torch
from crossdock.pages import use_huge_pages

def on_huge_pages():
    return int(re.search(r"AnonHugePages: *(\\d+)", open("/proc/self/smaps_rollup").read())[1]) * 1024

weight = torch.arange(4 << 20, dtype=torch.float32)
before, place = on_huge_pages(), weight.data_ptr()
moved = use_huge_pages([weight])
assert torch.equal(weight, torch.arange(4 << 20, dtype=torch.float32)) and weight.data_ptr() == place
print(moved, on_huge_pages() - before)
"""


@has_huge_pages
def test_a_weight_moves_with_its_values() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    moved, grown = map(int, done.stdout.split())
    assert moved in (0, grown)  # none where the kernel has no free one, or none that it can move to
    if moved:
        assert 12 << 20 <= moved <= 16 << 20


@pytest.mark.skipif(not can_pack(torch.zeros(512, 512, dtype=torch.bfloat16)), reason="no bfloat16 in oneDNN")
def test_packed_weights_keep_their_values() -> None:
    weights = [torch.randn(768, 1024).to(torch.bfloat16) for _ in range(8)]
    packed, x_MK = [pack(weight) for weight in weights], torch.randn(4, 1024).to(torch.bfloat16)
    use_huge_pages([*packed, torch.empty(3, device="meta"), torch.empty(0)])
    for weight, moved in zip(weights, packed, strict=True):
        assert torch.equal(linear(x_MK, moved), linear(x_MK, weight))
