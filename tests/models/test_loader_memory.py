"""Loading in pieces: the same values, and no more memory than the model's own but for a bounded amount."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from crossdock.gemm import dequantize_blocks, quantize_blocks
from crossdock.models import loader
from crossdock.models.loader import Checkpoint, Source, Target, load_into

PEAK = """
import sys, torch
from crossdock.models.loader import Checkpoint, Source, Target, load_into
def peak():  # not getrusage: that counts what the parent held when it started this process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
target = Target(torch.zeros(16384, 4096, dtype=torch.bfloat16), (Source("w"),))
torch.zeros(1).bfloat16().float()
before = peak()
load_into(Checkpoint(sys.argv[1]), [target])
print(peak() - before)
"""


def test_pieces_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torch.randn(700, 200)
    codes, scale = quantize_blocks(stored)
    save_file({"plain": stored, "w": codes, "w_scale_inv": scale}, tmp_path / "model.safetensors")
    monkeypatch.setattr(loader, "PIECE_VALUES", 300 * 200)
    read: list[Source] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, source: (read.append(source), original(self, source))[1])
    plain, whole = torch.empty(700, 200), torch.empty(700, 200)
    report = load_into(Checkpoint(tmp_path), [Target(plain, (Source("plain"),)), Target(whole, (Source("w"),))])
    assert torch.equal(plain, stored) and torch.equal(whole, dequantize_blocks(codes, scale))
    assert [source.index[0] for source in read if source.name == "plain"] == [
        slice(0, 256), slice(256, 512), slice(512, 700)
    ]  # fmt: skip
    assert report.tensors == 2 and report.bytes_read == 700 * 200 * 5 and report.unused == ()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_fp8_tensor_takes_little_more_than_its_own_memory(tmp_path: Path) -> None:
    codes = torch.zeros(16384, 4096, dtype=torch.float8_e4m3fn)
    save_file({"w": codes, "w_scale_inv": torch.ones(128, 32)}, tmp_path / "model.safetensors")
    found = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True, timeout=60,
    )  # fmt: skip
    own, stored = 128, 64  # MB; three copies in float32 would be another 768
    assert own < int(found.stdout) < own + stored + 350
