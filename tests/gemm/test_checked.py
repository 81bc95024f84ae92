"""Bad values of ends, counts and row ids: named on a CPU always, on a GPU where `checked` asks for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from crossdock.errors import ConfigError
from crossdock.gemm import (
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_gemm_fp8_masked,
    grouped_gemm_fp8_rowwise,
    grouped_gemm_masked,
    grouped_swiglu,
    grouped_swiglu_fp8,
)
from crossdock.gemm.checks import check_groups, check_slabs
from tests.gemm.cases import float_case, fp8_case

CPU = torch.device("cpu")


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU, and cannot be read on the host unless `readable`."""

    readable = False

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:0")

    def tolist(self) -> list[int]:
        assert OnGpu.readable, "the host waited for the device"
        return self.as_subclass(Tensor).tolist()  # type: ignore[no-any-return]


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = [  # ends, row ids (9 rows), what is said of them
    (ends(2, 6), ids(0, 1, 2, 3, 4), r"ends_L must not end beyond the number of row ids, 5, found 6"),
    (ends(4, 2), ids(0, 1, 2, 3, 4), r"ends_L must not decrease: group 1 ends at 2 but starts at 4"),
    (ends(2, 5), ids(0, 1, 9, 3, 4), r"row_ids_R must be in \[0, 9\), the rows of .*, found 9 at 2"),
    (ends(2, 5), ids(0, 1, 2, -1, 12), r"row_ids_R must be in \[0, 9\), the rows of .*, found -1 at 3"),
    (ends(2, 4), None, r"ends_L must end at the number of rows, 9, found 4"),
    (ends(0, 10), None, r"ends_L must end at the number of rows, 9, found 10"),
]


@pytest.mark.parametrize(("ends_L", "row_ids_R", "match"), BAD)
def test_every_product_on_a_cpu(ends_L: Tensor, row_ids_R: Tensor | None, match: str) -> None:
    rows_TK, weights_LNK, _ = float_case([4, 5], 8, 16, torch.float32, CPU)
    q_TK, scale_TB, wq_LNK, wscale_LBB, _ = fp8_case([4, 5], 256, 128, CPU)
    block = q_TK, scale_TB, wq_LNK, wscale_LBB, ends_L
    row = q_TK, scale_TB[:, 0], wq_LNK, wscale_LBB[:, :1, 0].repeat(1, 256), ends_L
    calls: list[tuple[Callable[..., object], tuple[Tensor, ...]]] = [
        (grouped_gemm, (rows_TK, weights_LNK, ends_L)),
        (grouped_swiglu, (rows_TK, weights_LNK, ends_L)),
        (grouped_gemm_fp8, block),
        (grouped_gemm_fp8_rowwise, row),
        (grouped_swiglu_fp8, block),
    ]
    for function, args in calls:
        for backend in ("torch", "triton"):
            with pytest.raises(ConfigError, match=match):
                function(*args, backend=backend, row_ids_R=row_ids_R)


@pytest.mark.parametrize(("ends_L", "row_ids_R", "match"), BAD)
def test_on_a_gpu_values_are_read_only_where_asked(
    ends_L: Tensor, row_ids_R: Tensor | None, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_TK, weights_LNK, _ = float_case([4, 5], 8, 16, torch.float32, CPU)
    rows, weights, ends_ = (tensor.as_subclass(OnGpu) for tensor in (rows_TK, weights_LNK, ends_L))
    row_ids = None if row_ids_R is None else row_ids_R.as_subclass(OnGpu)
    check_groups(rows, weights, ends_, "rows_RK", "weights_LNK", row_ids)
    monkeypatch.setattr(OnGpu, "readable", True)
    with pytest.raises(ConfigError, match=match):
        check_groups(rows, weights, ends_, "rows_RK", "weights_LNK", row_ids, checked=True)


def test_counts_on_a_gpu_are_read_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    slabs, weights = torch.zeros(2, 4, 16).as_subclass(OnGpu), torch.zeros(2, 8, 16).as_subclass(OnGpu)
    counts_L = ends(4, 5).as_subclass(OnGpu)
    check_slabs(slabs, weights, counts_L, "rows_LMK", "weights_LNK")
    monkeypatch.setattr(OnGpu, "readable", True)
    with pytest.raises(ConfigError, match=r"counts_L must be in \[0, M = 4\], found 5 for group 1"):
        check_slabs(slabs, weights, counts_L, "rows_LMK", "weights_LNK", checked=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("ends_L", "row_ids_R", "match"), BAD)
def test_every_product_on_a_gpu(ends_L: Tensor, row_ids_R: Tensor | None, match: str, device: torch.device) -> None:
    rows_TK, weights_LNK, _ = float_case([4, 5], 8, 16, torch.float32, device)
    row_ids_R = None if row_ids_R is None else row_ids_R.to(device)
    for product in (grouped_gemm, grouped_swiglu):
        with pytest.raises(ConfigError, match=match):
            product(rows_TK, weights_LNK, ends_L.to(device), row_ids_R=row_ids_R, checked=True)


def test_shapes_and_dtypes_of_row_ids() -> None:
    rows_TK, weights_LNK, ends_L = float_case([4, 5], 8, 16, torch.float32, CPU)
    with pytest.raises(ConfigError, match=r"row_ids_R must have 1 dimensions \[R\], found shape \(3, 3\)"):
        grouped_gemm(rows_TK, weights_LNK, ends_L, row_ids_R=torch.arange(9).view(3, 3))
    with pytest.raises(ConfigError, match=r"row_ids_R must be torch.int32 or torch.int64 .*, found torch.float32"):
        grouped_gemm(rows_TK, weights_LNK, ends_L, row_ids_R=torch.zeros(9))
    with pytest.raises(ConfigError, match=r"row_ids_R is on meta, but rows_RK is on cpu"):
        grouped_gemm(rows_TK, weights_LNK, ends_L, row_ids_R=torch.arange(9, device="meta"))


def test_checked_changes_nothing_else(device: torch.device) -> None:
    rows_RK, weights_LNK, ends_L = float_case([4, 5], 8, 16, torch.float32, device)
    q_RK, scale_RB, *weights, _ = fp8_case([4, 5], 256, 128, device)
    counts_L = torch.tensor([3, 1], dtype=torch.int32, device=device)
    slabs = q_RK[:8].view(2, 4, 128), scale_RB[:8].view(2, 4, 1)
    by_row = scale_RB[:, 0], weights[0], weights[1][:, :1, 0].repeat(1, 256), ends_L
    for checked in (False, True):
        assert grouped_gemm(rows_RK, weights_LNK, ends_L, checked=checked).shape == (9, 8)
        assert grouped_swiglu(rows_RK, weights_LNK, ends_L, checked=checked).shape == (9, 4)
        assert grouped_gemm_fp8(q_RK, scale_RB, *weights, ends_L, checked=checked).shape == (9, 256)
        assert grouped_gemm_fp8_rowwise(q_RK, *by_row, checked=checked).shape == (9, 256)
        assert grouped_swiglu_fp8(q_RK, scale_RB, *weights, ends_L, checked=checked)[0].shape == (9, 128)
        assert grouped_gemm_masked(rows_RK[:8].view(2, 4, 16), weights_LNK, counts_L, checked=checked).shape == (
            2,
            4,
            8,
        )
        assert grouped_gemm_fp8_masked(*slabs, *weights, counts_L, checked=checked).shape == (2, 4, 256)
