"""The audit compiles kernels of a few lines for all three targets, judges them, and says so in JSON."""

import json

import pytest

from crossdock.cli.audit_worker import SHARED_LIMIT, find_specs, judge, matrix_instructions
from tests.cli.conftest import Run
from tests.cli.tiny_kernels import AUDIT

pytest.importorskip("triton")

FIELDS = {"kernel", "target", "config", "registers", "spills", "shared_bytes", "matrix_instructions", "ok"}
MODULE = "tests.cli.tiny_kernels"


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
    assert "over the limit" in judge(product, "gfx942", 0, SHARED_LIMIT["gfx942"] + 1, ["v_mfma_f32_32x32x8_bf16"])
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
    names = {spec.name for spec in find_specs([])}
    assert any("grouped_gemm" in name for name in names)
