"""MLA's kernels against their references and float64, and what a decoded token's bits may depend on.

Legend as in crossdock/models/deepseek: T tokens, N decoded ones, H heads, U nope, R rotary and V value width of a head,
C latent width.
"""

import importlib
import math

import pytest
import torch
from torch import Tensor

from crossdock.backend import Backend
from crossdock.errors import ConfigError
from crossdock.gemm import QuantSpec, quantize_rows
from crossdock.models import cache as cache_module
from crossdock.models.blocks import rotate_interleaved
from crossdock.models.cache import MAX_PORTIONS, PORTION, Decoding, Sequence
from crossdock.models.deepseek.absorbed_kernel import absorb_queries_ref, absorb_queries_triton
from crossdock.models.deepseek.latent_attention_kernel import attend_latents_ref, attend_latents_triton
from crossdock.models.deepseek.mla_kernel import prepare_latents_ref, prepare_latents_triton
from crossdock.models.deepseek.values_kernel import expand_values_ref, expand_values_triton
from tests.models.latents import SCALE, Step, decades, tables

DTYPES = [torch.float32, torch.bfloat16]
CPU = torch.device("cpu")
EPS = 1e-6
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7}  # interpreted bf16 truncates
CONTEXTS, NEWS = [1, 8, PORTION + 1, 9, 2 * PORTION, 3], [1, 2, 2, 1, 1, 3]


def ulps(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the last place of what is expected."""
    bits = {torch.float32: 23, torch.bfloat16: 7}[found.dtype]
    unit = 2.0 ** (torch.frexp(expected.double())[1] - 1 - bits).clamp(min=-120)
    return float(((found.double() - expected.double()).abs() / unit).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("tokens", "rank", "latent", "width"), [(1, 24, 16, 8), (5, 33, 20, 6), (3, 7, 130, 2)])
@pytest.mark.usefixtures("poison")
def test_norms_rotation_and_cache_write(
    dtype: torch.dtype,
    compressed: bool,
    interleaved: bool,
    tokens: int,
    rank: int,
    latent: int,
    width: int,
    device: torch.device,
) -> None:
    a_TX = decades(tokens, rank + latent + width, seed=1, dtype=dtype, device=device)
    weights = decades(1, rank + latent, seed=2, dtype=dtype, device=device)[0]
    q_weight_Q, kv_weight_C = weights[:rank] if compressed else None, weights[rank:]
    rows_T = torch.tensor([6, 0, 11, 3, 8], device=device)[:tokens]
    found, expected = (torch.full((12, latent + width), math.nan, dtype=dtype, device=device) for _ in range(2))
    rest = (kv_weight_C, tables(tokens, width // 2, device), rows_T)
    q_found = prepare_latents_triton(a_TX, q_weight_Q, *rest, found, EPS, interleaved)
    q_expected = prepare_latents_ref(a_TX, q_weight_Q, *rest, expected, EPS, interleaved)
    assert q_found.shape == q_expected.shape == (tokens, rank) and q_found.dtype == dtype
    untouched = torch.ones(12, dtype=torch.bool, device=device)
    untouched[rows_T] = False
    assert found[untouched].isnan().all()
    most = 5 if dtype == torch.float32 else 1  # two roundings each of the mean, the root and the products
    assert ulps(q_found, q_expected) <= (most if compressed else 0)
    assert ulps(found[rows_T][:, :latent], expected[rows_T][:, :latent]) <= most
    key_TR = a_TX[:, rank + latent :].double()  # the two products of a rotation may cancel
    size_T = key_TR.abs().amax(-1, keepdim=True) * (2.0**-22 if dtype == torch.float32 else 2.0**-6)
    assert ((found[rows_T][:, latent:].double() - expected[rows_T][:, latent:].double()).abs() <= size_T).all()


def test_a_cache_of_another_dtype_is_named() -> None:
    a_TX, weight_C = torch.zeros(1, 24), torch.ones(16)
    cache = torch.zeros(4, 24, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"cache must have the dtype of the model, torch.float32, found torch.bf"):
        prepare_latents_triton(a_TX, None, weight_C, tables(1, 4, CPU), torch.tensor([0]), cache, EPS, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "pow2"), [(24, False), (128, True), (200, False), (256, True)])
@pytest.mark.usefixtures("poison")
def test_queries_that_leave_quantised(dtype: torch.dtype, rank: int, pow2: bool, device: torch.device) -> None:
    """Codes and scales of the queries that leave as they are; the cache gets the same either way."""
    a_TX = decades(5, rank + 24, seed=1, dtype=dtype, device=device)
    weights = decades(1, rank + 16, seed=2, dtype=dtype, device=device)[0]
    found, expected = (torch.full((12, 24), math.nan, dtype=dtype, device=device) for _ in range(2))
    args = a_TX, weights[:rank], weights[rank:], tables(5, 4, device), torch.tensor([6, 0, 11, 3, 8], device=device)
    quant = QuantSpec("fp8_block", pow2_scales=pow2)
    q_TQ = prepare_latents_triton(*args, expected, EPS, True)
    assert isinstance(q_TQ, Tensor)
    for prepare in (prepare_latents_triton, prepare_latents_ref):
        (codes_TQ, scale_TB), seen_TQ = prepare(*args, found, EPS, True, quant), q_TQ
        if prepare is prepare_latents_ref:  # whose norm adds up in another order
            seen_TQ = prepare(*args, found, EPS, True)  # type: ignore[assignment]
        assert codes_TQ.dtype == torch.float8_e4m3fn and scale_TB.shape == (5, -(-rank // 128))
        backend: Backend = "triton" if prepare is prepare_latents_triton else "torch"
        expected_TQ, expected_TB = quantize_rows(seen_TQ, pow2=pow2, backend=backend)
        assert torch.equal(codes_TQ.view(torch.uint8), expected_TQ.view(torch.uint8))
        assert torch.equal(scale_TB, expected_TB)
        if prepare is prepare_latents_triton:
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.usefixtures("poison")
def test_absorbed_queries(dtype: torch.dtype, interleaved: bool, device: torch.device) -> None:
    step = Step([9] * 70 if interleaved else [3, 1], [1] * (70 if interleaved else 2), dtype, device)
    rest = step.rope, step.decoding, step.heads, interleaved
    found = absorb_queries_triton(step.q_TQ, step.weight, *rest)
    expected = absorb_queries_ref(step.q_TQ, step.weight, *rest)
    sizes = absorb_queries_ref(step.q_TQ.abs(), step.weight.abs(), *rest)  # of what is added up
    sizes[..., step.latent :] = step.q_TQ.abs().amax(-1)[:, None, None]
    assert found.shape == expected.shape and found.dtype == dtype
    bound = sizes.double() * 2.0**-20 + expected.abs().double() * ROUNDING[dtype]
    assert ((found.double() - expected.double()).abs() <= bound).all()
    if interleaved:  # the same token 70 times, in two tiles
        assert (found == found[:1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("poison")
def test_attention_over_pages(dtype: torch.dtype, device: torch.device) -> None:
    """Against the reference: exact but for the float32 sums and, in bfloat16, for the rounding of each probability."""
    step = Step(CONTEXTS, NEWS, dtype, device)
    q_NHX = absorb_queries_ref(step.q_TQ, step.weight, step.rope, step.decoding, step.heads, True)
    args = q_NHX, step.cache.data[0], step.decoding, step.latent, SCALE
    (mean_WHC, lse_WH), (mean_ref, lse_ref) = attend_latents_triton(*args), attend_latents_ref(*args)
    assert (step.decoding.stop_W - step.decoding.start_W).max() == PORTION < max(CONTEXTS)
    for w, owner in enumerate(step.decoding.owner_W.tolist()):
        start, stop = int(step.decoding.start_W[w]), int(step.decoding.stop_W[w])
        row_JX, q_HX = step.rows(owner)[start:stop], q_NHX[owner].double()
        probs_HJ = (SCALE * q_HX @ row_JX.T).softmax(-1)
        of_scores = SCALE * (q_HX.abs() @ row_JX.abs().T).amax(-1, keepdim=True) * 2.0**-20
        bound = (probs_HJ @ row_JX[:, : step.latent].abs()) * (2 * of_scores + ROUNDING[dtype] + 2.0**-20)
        assert ((mean_WHC[w].double() - probs_HJ @ row_JX[:, : step.latent]).abs() <= bound).all()
        assert ((mean_WHC[w] - mean_ref[w]).abs() <= bound).all()
        assert ((lse_WH[w] - lse_ref[w]).abs()[:, None] <= 2 * of_scores + lse_ref[w].abs()[:, None] * 2.0**-20).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[1], [3, 1, 9, 2, MAX_PORTIONS], [1] * 17])
@pytest.mark.usefixtures("poison")
def test_values_of_several_portions(dtype: torch.dtype, counts: list[int], device: torch.device) -> None:
    heads, nope, value, latent = 3, 4, 20, 70
    generator = torch.Generator().manual_seed(len(counts))
    portions, tokens = sum(counts), len(counts)
    mean_WHC = torch.randn(portions, heads, latent, generator=generator).to(device)
    lse_WH = (torch.randn(portions, heads, generator=generator) * 20).to(device)
    weight = decades(heads * (nope + value), latent, seed=1, dtype=dtype, device=device)
    first = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32, device=device)
    order = torch.randperm(tokens, generator=generator).to(device, torch.int32)
    none = first[:0]
    decoding = Decoding(8, order, first, none, none, none, none, none)
    found, expected, sizes = (torch.full((tokens, heads * value), math.nan, dtype=dtype, device=device) for _ in "123")
    expand_values_triton(mean_WHC, lse_WH, weight, decoding, nope, found)
    expand_values_ref(mean_WHC, lse_WH, weight, decoding, nope, expected)
    expand_values_ref(mean_WHC.abs(), lse_WH, weight.abs(), decoding, nope, sizes)
    bound = sizes.double() * (2.0**-18 + ROUNDING[dtype]) + expected.abs().double() * ROUNDING[dtype]
    assert ((found.double() - expected.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.usefixtures("poison")
def test_values_that_leave_quantised(dtype: torch.dtype, pow2: bool, device: torch.device) -> None:
    """Codes and scales of the values that leave as they are, heads of 128."""
    heads, nope, value, latent, tokens = 3, 4, 128, 40, 5
    generator = torch.Generator().manual_seed(5)
    mean_WHC = (torch.randn(7, heads, latent, generator=generator) * 10 ** torch.randn(7, heads, 1)).to(device)
    lse_WH = torch.randn(7, heads, generator=generator).to(device)
    weight = decades(heads * (nope + value), latent, seed=1, dtype=dtype, device=device)
    first = torch.tensor([0, 1, 2, 5, 6, 7], dtype=torch.int32, device=device)
    order, none = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32, device=device), first[:0]
    decoding = Decoding(8, order, first, none, none, none, none, none)
    plain_TX = torch.full((tokens, heads * value), math.nan, dtype=dtype, device=device)
    for expand in (expand_values_triton, expand_values_ref):
        codes_TX = torch.empty(tokens, heads * value, dtype=torch.float8_e4m3fn, device=device)
        scale_TB = torch.empty(tokens, heads, device=device)
        expand(mean_WHC, lse_WH, weight, decoding, nope, plain_TX)
        expand(mean_WHC, lse_WH, weight, decoding, nope, codes_TX, scale_TB, QuantSpec("fp8_block", pow2_scales=pow2))
        backend: Backend = "triton" if expand is expand_values_triton else "torch"
        expected_TX, expected_TB = quantize_rows(plain_TX, pow2=pow2, backend=backend)
        assert torch.equal(codes_TX.view(torch.uint8), expected_TX.view(torch.uint8))
        assert torch.equal(scale_TB, expected_TB)


def test_decoding_against_attention_in_float64(device: torch.device) -> None:
    """The three together against keys and values of every head, expanded."""
    step = Step(CONTEXTS, NEWS, torch.float32, device)
    found = step.run().double().view(-1, step.heads, step.value)
    w_HXC = step.weight.double().view(step.heads, -1, step.latent)
    q_THX = step.q_TQ.double().view(len(found), step.heads, -1)
    turned = rotate_interleaved(q_THX[..., step.nope :], (step.rope[0].double(), step.rope[1].double()))
    for token, (q_HX, turned_HR) in enumerate(zip(q_THX, turned, strict=True)):
        latent_JC, key_JR = step.rows(token).split((step.latent, step.width), dim=-1)
        k_HJU, v_HJV = (latent_JC @ w_HXC.transpose(1, 2)).split((step.nope, step.value), dim=-1)
        scores_HJ = torch.einsum("hu,hju->hj", q_HX[:, : step.nope], k_HJU) + turned_HR @ key_JR.T
        probs_HJ = (SCALE * scores_HJ).softmax(-1)
        size = torch.einsum("hj,hjv->hv", probs_HJ, v_HJV.abs())
        assert ((found[token] - torch.einsum("hj,hjv->hv", probs_HJ, v_HJV)).abs() <= 1e-3 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_company(dtype: torch.dtype, device: torch.device) -> None:
    """Nor on the tokens verified beside a token, nor on where its pages lie, nor on a second run."""
    contexts, news = [1, PORTION + 1, 9, 3], [1, 2, 1, 3]
    whole = Step(contexts, news, dtype, device)
    found = whole.run()
    assert torch.equal(found, whole.run())
    for context, span in zip(contexts[1:], whole.batch.spans[1:], strict=True):
        assert torch.equal(Step([context], [1], dtype, device).run(), found[span.stop - 1 : span.stop])


def test_long_contexts_have_longer_portions_and_no_more_of_them(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(cache_module, "PORTION", 16)
    for contexts in ([16 * MAX_PORTIONS], [16 * MAX_PORTIONS + 1, 5]):
        step = Step(contexts, [1] * len(contexts), torch.float32, device)
        counts = (step.decoding.first_N1[1:] - step.decoding.first_N1[:-1]).tolist()
        assert max(counts) <= MAX_PORTIONS and len(step.decoding.owner_W) == sum(counts)
        size = int((step.decoding.stop_W - step.decoding.start_W).max())
        assert size == (16 if len(contexts) == 1 else 32)
        assert step.run().isfinite().all()


def test_pages_beyond_int32(device: torch.device) -> None:
    """Page numbers that fit int32 and rows whose offsets do not, in memory that stays untouched but for a few pages."""
    near = Step([11], [1], torch.bfloat16, device)
    far = Step([11], [1], torch.bfloat16, device)
    width, far_page = near.latent + near.width, 2**31 // (8 * (near.latent + near.width)) + 5
    far.cache.data = torch.empty(1, (far_page + 2) * 8, width, dtype=torch.bfloat16, device=device)
    (span,) = near.batch.spans
    far.batch = far.cache.batch([(Sequence([far_page, far_page + 1], 10), 1, True)])
    far.cache.data[0][far.batch.spans[0].rows] = near.cache.data[0][span.rows]
    assert torch.equal(far.run(), near.run())


@pytest.mark.parametrize("module", ["mla_kernel", "absorbed_kernel", "latent_attention_kernel", "values_kernel"])
def test_audited_configurations_fit_their_kernels(module: str) -> None:
    specs = importlib.import_module(f"crossdock.models.deepseek.{module}").AUDIT
    assert specs
    for spec in specs:
        assert list(spec.signature) == list(spec.kernel.arg_names)
        assert {name for name, kind in spec.signature.items() if kind == "constexpr"} == set(spec.constexprs)
