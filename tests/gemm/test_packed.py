"""Packed weights: the bits of the unpacked product, and when packing is chosen."""

from typing import Any

import pytest
import torch

from crossdock import LocalWorld, MoEConfig, MoELayer, load_model
from crossdock.cli.request import example_directory
from crossdock.comm import LocalTransport
from crossdock.gemm import packed
from crossdock.gemm.grouped_torch import grouped_matmul
from crossdock.linear import can_pack, linear, pack
from crossdock.moe import Experts
from crossdock.moe.experts import PackedExperts

BIG = MoEConfig(hidden_size=512, expert_size=320, num_experts=4, top_k=2)

needs_onednn = pytest.mark.skipif(
    not can_pack(torch.zeros(512, 512, dtype=torch.bfloat16)), reason="this torch has no bfloat16 in oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("counts", [[1], [0, 2, 0, 1], [3, 1, 1, 70], [5, 0, 4, 2]])
def test_packed_product_has_the_same_bits(counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    rows_RK = torch.randn(sum(counts), 512, generator=generator).to(torch.bfloat16)
    weights_LNK = torch.randn(len(counts), 384, 512, generator=generator).to(torch.bfloat16)
    ends_L = torch.tensor(counts).cumsum(0).to(torch.int32)
    found_RN = packed.packed_matmul(rows_RK, packed.pack_groups(weights_LNK), ends_L)
    assert torch.equal(found_RN, grouped_matmul(rows_RK, weights_LNK, ends_L))


def build(config: MoEConfig, dtype: torch.dtype, rank: int = 0, world_size: int = 1) -> MoELayer:
    layer = MoELayer(config, LocalTransport(), dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return layer


@needs_onednn
def test_a_packed_layer_gives_the_same_bits() -> None:
    layer = build(BIG, torch.bfloat16)
    x_TD = torch.randn(9, 512, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    with torch.inference_mode():
        expected_TD, nothing_TD = layer(x_TD), layer(x_TD[:0])
        layer.pack()
        assert isinstance(layer.experts, PackedExperts)
        assert torch.equal(layer(x_TD), expected_TD)
        assert torch.equal(layer(x_TD[:0]), nothing_TD)


def test_what_packing_does_not_help_stays_as_it_is() -> None:
    small = MoEConfig(hidden_size=64, expert_size=32, num_experts=4, top_k=2)
    for config, dtype in ((small, torch.bfloat16), (BIG, torch.float32)):
        layer = build(config, dtype)
        layer.pack()
        assert isinstance(layer.experts, Experts)


def test_few_rows_of_small_experts_have_the_bits_of_many() -> None:
    """Below and above the number of rows for which weights are copied into one batch."""
    generator = torch.Generator().manual_seed(8)
    weights_LNK = torch.randn(6, 64, 96, generator=generator).to(torch.bfloat16)
    for counts in ([1, 0, 3, 0, 0, 2], [0, 0, 16, 0, 0, 0], [0] * 6):
        ends_L = torch.tensor(counts).cumsum(0).to(torch.int32)
        rows_RK = torch.randn(sum(counts), 96, generator=generator).to(torch.bfloat16)
        found_RN = grouped_matmul(rows_RK, weights_LNK, ends_L)
        repeated = rows_RK.repeat_interleave(torch.tensor(8), dim=0)  # eight of each: too many for one batch
        many_RN = grouped_matmul(repeated, weights_LNK, ends_L * 8)
        assert torch.equal(found_RN, many_RN[::8])


@needs_onednn
def test_ranks_with_packed_experts_give_the_same_bits() -> None:
    x_TD = torch.randn(8, 512, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    whole = build(BIG, torch.bfloat16)

    def run(transport: LocalTransport) -> torch.Tensor:
        layer = MoELayer(BIG, transport, dtype=torch.bfloat16)
        first = transport.rank * layer.placement.slots_per_rank
        mine = slice(first, first + layer.placement.slots_per_rank)
        with torch.no_grad():
            layer.router.weight.copy_(whole.router.weight)
            layer.experts.gate_up.copy_(whole.experts.gate_up[mine])
            layer.experts.down.copy_(whole.experts.down[mine])
            layer.pack()
            share = 8 // transport.world_size
            return layer(x_TD[transport.rank * share : (transport.rank + 1) * share])

    with torch.no_grad():
        expected_TD = whole(x_TD)
    assert torch.equal(torch.cat(LocalWorld(2).run(run)), expected_TD)


@needs_onednn
@pytest.mark.parametrize(("columns", "inner"), [(352, 256), (1000, 136), (64, 64)])
def test_a_packed_dense_product_has_the_same_bits(columns: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    w_NK = torch.randn(columns, inner, generator=generator).to(torch.bfloat16)
    bias_N = torch.randn(columns, generator=generator).to(torch.bfloat16)
    packed_NK = pack(w_NK)
    assert packed_NK.is_mkldnn and packed_NK.shape == w_NK.shape and packed_NK.dtype == w_NK.dtype
    wide_MK = torch.randn(33, inner + 8, generator=generator).to(torch.bfloat16)
    for rows in (0, 1, 3, 33):
        for x_MK in (wide_MK[:rows, :inner], wide_MK[:rows, :inner].contiguous()):
            assert torch.equal(linear(x_MK, packed_NK), linear(x_MK, w_NK))
            assert torch.equal(linear(x_MK, packed_NK, bias_N), linear(x_MK, w_NK, bias_N))


def test_other_weights_are_not_packed() -> None:
    for w_NK in (torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(512, 512)):
        assert pack(w_NK) is w_NK


@needs_onednn
def test_a_loaded_model_is_packed_but_for_what_others_read() -> None:
    model: Any = load_model(example_directory(), LocalTransport(), dtype=torch.bfloat16).model
    assert model.lm_head.weight.is_mkldnn and model.layers[0].mlp.down.is_mkldnn
    assert not model.layers[0].self_attn.kv_b_proj.weight.is_mkldnn  # absorbed attention takes it apart
