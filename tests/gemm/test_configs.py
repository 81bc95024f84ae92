"""Which tile a product gets: by formula within each target's limits, by tables only for exactly what they name."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crossdock.errors import ConfigError
from crossdock.gemm import configs, tables
from crossdock.gemm.candidates import Usage, candidates, over_limits, predict
from crossdock.gemm.configs import KINDS, TARGETS, Bucket, Kind, Problem, TileConfig, choose, formula, stage_bytes

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
KEY = "bf16 N=4096 K=7168 L=32 R/L=8"
PROBLEM = Problem("bf16", 256, 32, 4096, 7168)
TUNED = TileConfig(64, 256, 64, 8, 3)
ENTRY = {"block_m": 64, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 3, "us": 40.5}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A pretended H200, no packaged table, and the user's table where it says."""
    found = SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(configs, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(tables, "user_path", lambda: tmp_path / "cache" / "tuned.json")
    monkeypatch.setattr(configs, "_given", [])
    configs.forget()
    yield tmp_path / "cache" / "tuned.json"
    configs.forget()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_formula_stays_within_each_target(target: str, kind: Kind) -> None:
    limits = TARGETS[target]
    for rows in (0, 1, 32, 33 * 32, 64 * 32, 65 * 32, 4096 * 32):
        tile = formula(Bucket.of(Problem(kind, rows, 32, 2048, 7168)), limits)
        configs.check_tile(kind, tile)
        assert over_limits(kind, tile, limits) == ""
        assert tile.num_warps in (4, 8) and tile.block_m >= 64  # or Hopper would not take wgmma
        assert tile.num_stages <= 2 if limits.is_amd else tile.num_stages >= 3


def test_the_formula_turns_where_rows_pass_64_a_group() -> None:
    few, many = (choose(Problem("fp8_block", rows, 32, 4096, 7168), CPU) for rows in (64 * 32, 64 * 32 + 1))
    assert (few.block_m, few.num_warps, many.block_m, many.num_warps) == (64, 4, 128, 8)
    assert few.block_n == many.block_n and few.block_k == many.block_k == 128  # one order of sums


@pytest.mark.parametrize("shared", [49152, 65536, 101376, 166912])
def test_an_unknown_gpu_works_at_once(shared: int) -> None:
    limits = configs.Limits("sm_89", 46, shared)
    for rows in (8, 8192):
        tile = formula(Bucket.of(Problem("bf16", rows, 8, 1000, 500)), limits)
        assert tile.num_stages == 1 or tile.num_stages * stage_bytes("bf16", tile) <= shared


def test_buckets_are_powers_of_two_of_groups_and_rows_a_group() -> None:
    assert Bucket.of(PROBLEM).key() == KEY
    assert Bucket.of(Problem("bf16", 257, 32, 4096, 7168)).rows_per_group == 16
    assert Bucket.of(Problem("bf16", 0, 0, 64, 64)) == Bucket("bf16", 64, 64, 1, 1)
    assert Bucket.of(Problem("bf16", 1, 33, 64, 64)) == Bucket("bf16", 64, 64, 64, 1)


def test_a_table_speaks_only_for_what_it_names(gpu: Path) -> None:
    own = choose(PROBLEM, GPU)
    tables.store(gpu, "NVIDIA H200", {KEY: ENTRY})
    assert choose(PROBLEM, GPU) == own  # files are read once
    configs.forget()
    assert choose(PROBLEM, GPU) == TUNED == choose(Problem("bf16", 160, 20, 4096, 7168), GPU)
    for other in (
        Problem("bf16", 256, 32, 4096, 7167),
        Problem("bf16", 256, 32, 4097, 7168),
        Problem("bf16", 288, 32, 4096, 7168),
        Problem("bf16", 256, 33, 4096, 7168),
    ):
        assert choose(other, GPU) == own
    assert choose(PROBLEM, CPU) == own


def test_entries_of_other_devices_and_versions_are_ignored(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.store(gpu, "NVIDIA B200", {KEY: ENTRY})
    with monkeypatch.context() as older:
        older.setattr(tables, "version", lambda: "triton 3.0, kernels 00000000")
        tables.store(gpu, "NVIDIA H200", {KEY: ENTRY})
    assert choose(PROBLEM, GPU) != TUNED
    assert len(json.loads(gpu.read_text())["devices"]) == 2


def test_the_users_table_comes_before_the_packages_and_a_given_one_before_both(gpu: Path, tmp_path: Path) -> None:
    tables.store(tmp_path / "packaged" / "h200.json", "NVIDIA H200", {KEY: ENTRY})
    assert choose(PROBLEM, GPU) == TUNED
    tables.store(gpu, "NVIDIA H200", {KEY: ENTRY | {"num_stages": 4}})
    configs.forget()
    assert choose(PROBLEM, GPU).num_stages == 4
    tables.store(tmp_path / "given.json", "NVIDIA H200", {KEY: ENTRY | {"num_stages": 2}})
    configs.load_table(tmp_path / "given.json")
    assert choose(PROBLEM, GPU).num_stages == 2


def table(tiles: dict[str, object]) -> str:
    return json.dumps({"format": 1, "devices": {"NVIDIA H200": {tables.version(): tiles}}})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "cannot be read as a table of tiles"),
        ("[]", "must be a table of tiles of format 1"),
        ('{"format": 2}', "format 1"),
        ('{"format": 1, "devices": {"NVIDIA H200": 3}}', "devices must hold a tile's sizes"),
        (table({KEY: {"block_m": "64"}}), "devices must hold a tile's sizes"),
        (table({KEY: {"block_m": 64}}), "has no block_n"),
        (table({"int4 N=1": ENTRY}), "has no kind"),
        (table({KEY: ENTRY | {"block_m": 48}}), "powers of two"),
        (table({KEY: ENTRY | {"block_k": 32}}), "must have block_k 64, found 32"),
        (table({"fp8_block_swiglu N=1": ENTRY | {"block_k": 128}}), "must have block_n 128"),
    ],
)
def test_a_broken_table_is_an_error_where_given_and_passed_over_where_found(gpu: Path, text: str, error: str) -> None:
    gpu.parent.mkdir()
    gpu.write_text(text)
    with pytest.raises(ConfigError, match=error):
        configs.load_table(gpu)
    with pytest.warns(UserWarning, match="tuned tiles are not used: .*" + error):
        own = choose(PROBLEM, GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(PROBLEM, GPU) == own == choose(PROBLEM, CPU)  # and said once


def test_a_file_that_is_no_table_is_not_written_over(gpu: Path) -> None:
    gpu.parent.mkdir()
    gpu.write_text("mine")
    with pytest.raises(ConfigError, match="cannot be read"):
        tables.store(gpu, "NVIDIA H200", {KEY: ENTRY})
    assert gpu.read_text() == "mine" and list(gpu.parent.iterdir()) == [gpu]


def test_a_trial_holds_for_its_kind_and_ends() -> None:
    own = choose(PROBLEM, CPU)
    with pytest.raises(ZeroDivisionError), configs.trial("bf16", TUNED):
        assert choose(PROBLEM, CPU) == TUNED and choose(Problem("fp32", 1, 1, 64, 64), CPU) != TUNED
        raise ZeroDivisionError
    assert choose(PROBLEM, CPU) == own


def test_versions_follow_the_kernels_code_and_not_their_words() -> None:
    source = (
        '@triton.jit\ndef f(x):\n    """What."""\n    y = x + 1  # one\n\n    return y\n\n\ndef host():\n    pass\n'
    )
    worded = source.replace("What.", "Else.").replace("# one", "# 1").replace("pass", "return 3")
    assert tables.kernel_text(source) == tables.kernel_text(worded) != tables.kernel_text(source.replace("+ 1", "+ 2"))
    assert "kernels " in tables.version()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_hold_the_formulas_tiles_and_fit(target: str, kind: Kind) -> None:
    found = candidates(kind, TARGETS[target])
    assert len(found) == len(set(found)) > 5
    for rows in (32, 32 * 1024):
        assert formula(Bucket.of(Problem(kind, rows, 32, 2048, 7168)), TARGETS[target]) in found
    assert all(over_limits(kind, tile, TARGETS[target]) == "" for tile in found)


def test_limits_name_what_is_over() -> None:
    tile, limits = TileConfig(128, 128, 64, 8, 4), TARGETS["sm_90"]
    assert "spills (8)" in over_limits("bf16", tile, limits, Usage(255, 8, 1000))
    assert over_limits("bf16", tile, limits, Usage(255, 0, 232448)) == ""
    assert "shared memory 232449 > 232448" in over_limits("bf16", tile, limits, Usage(255, 0, 232449))
    assert "shared memory of the pipeline" in over_limits("bf16", TileConfig(128, 128, 64, 8, 8), limits)
    assert "registers for accumulators" in over_limits("bf16", TileConfig(256, 256, 64, 8, 2), limits)


def test_the_model_prefers_what_is_known_to_be_better() -> None:
    limits = TARGETS["sm_90"]
    few, many = (Bucket("fp8_block", 4096, 7168, 32, rows) for rows in (8, 1024))
    narrow, wide = TileConfig(64, 128, 128, 4, 4), TileConfig(128, 128, 128, 8, 4)
    assert predict(few, narrow, limits) <= predict(few, wide, limits)
    assert predict(many, wide, limits) < predict(many, narrow, limits)
    shallow = TileConfig(64, 64, 128, 4, 2)
    assert predict(few, narrow, limits) <= predict(few, shallow, limits)
    assert predict(many, wide, limits) > 2 * 32 * 1024 * 4096 * 7168 / 1.98e15  # no faster than the matrix units


def test_a_home_that_may_not_be_searched_costs_a_warning(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", denied)
    with pytest.warns(UserWarning, match="tuned tiles are not used: .*Permission denied"):
        assert choose(PROBLEM, GPU) == formula(Bucket.of(PROBLEM), TARGETS["sm_90"])


def test_sizes_must_be_finite(gpu: Path) -> None:
    gpu.parent.mkdir(parents=True)
    held = {KEY: ENTRY | {"num_stages": float("nan")}}
    gpu.write_text(json.dumps({"format": 1, "devices": {"NVIDIA H200": {tables.version(): held}}}))
    with pytest.raises(ConfigError, match="devices must hold a tile's sizes"):
        configs.load_table(gpu)
