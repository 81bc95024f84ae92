"""Freed memory is kept: a large block of a process comes without new pages once there was one."""

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
