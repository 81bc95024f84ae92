"""The audit compiles kernels of a few lines for all three targets, judges them, and says so in JSON."""

import importlib
import json
from dataclasses import replace

import pytest

from crossdock._audit_spec import SHARED_BYTES, KernelSpec
from crossdock.cli.audit_tiles import expand, retile
from crossdock.cli.audit_worker import PACKAGES, audit_tasks, find_specs, judge, matrix_instructions
from crossdock.cli.shapes import production
from crossdock.gemm.configs import TARGETS, Bucket, TileConfig, formula
from tests.cli import tiny_kernels
from tests.cli.conftest import Run
from tests.cli.tiny_kernels import AUDIT

pytest.importorskip("triton")

FIELDS = {"kernel", "target", "config", "registers", "spills", "shared_bytes", "matrix_instructions", "ok"}
MODULE = "tests.cli.tiny_kernels"
WIDE = TileConfig(128, 256, 64, 8, 3)


def test_all_targets_with_the_interpreter_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, out, err = run("audit", "--module", MODULE, "--json")
    report = json.loads(out)
    builds = {(build["kernel"], build["target"]): build for build in report["kernels"]}
    assert (code, report["ok"]) == (1, False) and err == ""
    assert len(builds) == 9 and all(set(build) >= FIELDS for build in builds.values())
    for target in ("sm_90", "sm_100", "gfx942"):
        scale, product = builds["tiny_scale", target], builds["tiny_product", target]
        assert scale["ok"] and scale["registers"] > 0 and scale["spills"] == 0 and scale["matrix_instructions"] == []
        assert product["ok"] and product["shared_bytes"] > 0 and product["matrix_instructions"]
        lost = builds["tiny_lost", target]
        assert not lost["ok"] and lost["why"] == "no matrix instruction"
    assert builds["tiny_product", "sm_90"]["matrix_instructions"] == ["wgmma"]


def test_filters_and_text(run: Run) -> None:
    code, out, _ = run("audit", "--module", MODULE, "--kernel", "tiny_scale", "--target", "sm_90")
    assert code == 0 and "tiny_scale" in out and "gfx942" not in out
    assert "1 of 1 builds" in out


def test_nothing_found(run: Run) -> None:
    code, out, err = run("audit", "--module", MODULE, "--kernel", "zzz", "--json")
    assert (code, out) == (1, "") and "none of the AUDIT lists has a name with zzz" in err


def test_judgement() -> None:
    product = AUDIT[1]
    assert judge(product, "sm_90", 0, 1024, ["wgmma"]) == ""
    assert "spills" in judge(product, "sm_90", 8, 1024, ["wgmma"])
    assert "over the limit" in judge(product, "gfx942", 0, SHARED_BYTES["gfx942"] + 1, ["v_mfma_f32_32x32x8_bf16"])
    fp8 = type(product)("x", None, "", {"a": "*fp8e4nv"}, needs_matrix_instruction=True)
    assert "needs wgmma" in judge(fp8, "sm_90", 0, 0, ["mma.sync"])
    assert judge(fp8, "sm_100", 0, 0, ["mma.sync"]) == ""


def test_matrix_instructions_are_read_from_assembly() -> None:
    assert matrix_instructions("wgmma.mma_async.sync.aligned.m64n64k16\n mma.sync.aligned", "sm_90") == [
        "wgmma",
        "mma.sync",
    ]
    assert matrix_instructions("v_mfma_f32_16x16x32_fp8_fp8 v[0:3]", "gfx942") == ["v_mfma_f32_16x16x32_fp8_fp8"]


def test_specs_are_found_by_walking_the_packages() -> None:
    specs = find_specs([])
    assert any("grouped_gemm" in spec.name for spec in specs)
    assert len({(spec.name, spec.config) for spec in specs}) == len(specs)
    assert "crossdock.models" in PACKAGES and all(set(spec.targets) <= set(TARGETS) for spec in specs)


def test_every_production_tile_of_a_target_is_built_once() -> None:
    """Rows either side of the formula's boundary, each target's own stages, and no build twice."""
    listed = [spec for spec in importlib.import_module("crossdock.gemm.grouped_fp8_kernel").AUDIT]
    for target, limits in TARGETS.items():
        expected = {formula(Bucket.of(problem), limits) for problem in production("fp8_block")}
        assert {tile.block_m for tile in expected} == {64, 128}
        built = [s for s in expand(listed) if target in s.targets and s.kind == "fp8_block"]
        plain = [s for s in built if not s.constexprs["GATHER"] and not s.constexprs["MASKED"]]
        assert {(s.constexprs["BLOCK_M"], s.num_warps, s.num_stages) for s in plain} == {
            (tile.block_m, tile.num_warps, tile.num_stages) for tile in expected
        }
        assert len(plain) == len(expected) and all(s.constexprs["L_POW2"] == 512 for s in plain)  # Kimi K2's 384


def test_kernels_that_differ_in_types_stay_apart() -> None:
    spec = KernelSpec("f", None, "to bf16", {"out": "*bf16", "BLOCK_M": "constexpr"}, {"BLOCK_M": 1}, kind="bf16")
    found = expand([spec, replace(spec, config="to fp32", signature=spec.signature | {"out": "*fp32"}), spec])
    assert len(found) == 2 * len({(s.constexprs["BLOCK_M"], s.num_stages) for s in found})


def test_boxes_of_bulk_copies_follow_the_tile() -> None:
    types = {"rows": "tensordesc<bf16[64,64]>", "weights": "tensordesc<bf16[64, 64]>", "BLOCK_M": "constexpr"}
    made = retile(KernelSpec("f", None, "", types, {"BLOCK_M": 64}, kind="bf16"), next(production("bf16")), WIDE)
    assert made.signature == types | {"rows": "tensordesc<bf16[128,64]>", "weights": "tensordesc<bf16[256,64]>"}
    assert made.config == "bf16, 128x256x64, 8 warps, 3 stages"


def test_a_kernel_for_one_target_is_compiled_for_that_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"targets": ["sm_90", "gfx942"], "kernels": ["tiny_scale"], "modules": [MODULE]}
    assert [target for _, target in audit_tasks(job)] == ["sm_90", "gfx942"]
    monkeypatch.setattr(tiny_kernels, "AUDIT", [replace(AUDIT[0], targets=("gfx942",))])
    assert [target for _, target in audit_tasks(job)] == ["gfx942"]
