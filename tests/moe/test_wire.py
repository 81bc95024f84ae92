"""The FP8 wire: its rows against a quantiser written anew, and the bits of experts behind it on any number of ranks."""

import itertools

import pytest
import torch
from torch import Tensor

from crossdock import LocalWorld
from crossdock.backend import Backend
from crossdock.comm import Dispatcher, HierarchicalDispatcher, Inbound, LocalTransport, Transport, make_dispatcher
from crossdock.errors import ConfigError, PlanMismatch
from crossdock.gemm import QuantSpec, dequantize_rows, quantize_blocks, quantize_whole_rows
from crossdock.moe import MoEConfig
from crossdock.moe.experts import Experts, Fp8Experts, PackedExperts, make_experts
from crossdock.moe.wire import Fp8Wire
from crossdock.moe.wire_cpu import decode_rows
from crossdock.parallel import Topology

SLOTS, TOP_K, HIDDEN, INNER = 8, 3, 256, 128


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("hidden", [1, 16, 33, 128, 300, 640])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("poison")
def test_a_row_is_codes_and_scales_side_by_side(hidden: int, dtype: torch.dtype) -> None:
    x_TD, wire = seeded(9, hidden, dtype=dtype), Fp8Wire(hidden)
    rows_TX = wire.encode(x_TD)
    pitch, blocks, scales_at = rows_TX.shape[1], -(-hidden // 128), -(-hidden // 16) * 16
    assert rows_TX.dtype == torch.uint8 and pitch == wire.row_bytes(hidden) == scales_at + -(-4 * blocks // 16) * 16
    codes_TD, scale_TB = wire.parts(rows_TX)
    assert codes_TD.stride() == (pitch, 1) and scale_TB.stride()[0] == pitch // 4
    for token, block in itertools.product(range(9), range(blocks)):
        strip = x_TD[token, 128 * block : 128 * block + 128].float()
        scale = strip.abs().max() / 448
        codes = (strip / scale).to(torch.float8_e4m3fn)
        place = 128 * block
        assert scale_TB[token, block] == scale
        assert torch.equal(codes_TD[token, place : place + len(codes)].float(), codes.float())
        value = (codes.float() * scale).to(dtype)
        assert torch.equal(wire.decode(rows_TX, dtype)[token, place : place + len(codes)], value)
    assert rows_TX[:, hidden:scales_at].eq(0).all() and rows_TX[:, scales_at + 4 * blocks :].eq(0).all()


def test_scales_can_be_powers_of_two() -> None:
    _, scale_TB = Fp8Wire(256, pow2=True).parts(Fp8Wire(256, pow2=True).encode(seeded(5, 256)))
    assert torch.equal(scale_TB.log2(), scale_TB.log2().round())


def test_what_does_not_fit_spoils_its_strip_alone() -> None:
    x_TD = seeded(4, 256)
    x_TD[0, 3], x_TD[1, 200], x_TD[2] = float("nan"), float("inf"), 0.0
    wire = Fp8Wire(256)
    y_TD = wire.decode(wire.encode(x_TD), torch.float32)
    assert y_TD.isnan().nonzero()[:, 0].bincount().tolist() == [128, 128]
    assert y_TD[0, :128].isnan().all() and y_TD[1, 128:].isnan().all() and y_TD[2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_decodes_as_torch_casts_it(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32)
    codes[codes % 128 == 127] = 0  # what is no number is the scale's to say
    codes = codes.to(torch.uint8).view(torch.float8_e4m3fn).repeat(3, 1)
    scale = torch.tensor([[1.0, 0.3], [2.0**-126, 7e4], [float("nan"), 1e-3]])
    found, expected = decode_rows(codes, scale, dtype), dequantize_rows(codes, scale, dtype)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="made for rows of 64 values, found 128"):
        Dispatcher(LocalTransport(), 4, 128, torch.float32, codec=Fp8Wire(64))


def experts_for(kind: str, backend: Backend = "torch") -> list[Experts | Fp8Experts]:
    """One slot each."""
    quant = QuantSpec() if kind == "none" else QuantSpec(kind)  # type: ignore[arg-type]
    config, quantize = MoEConfig(HIDDEN, INNER, SLOTS, TOP_K, quant=quant), {"fp8_block": quantize_blocks}
    made = []
    for slot in range(SLOTS):
        experts = make_experts(config, 1, torch.bfloat16, torch.device("cpu"), backend)
        for n, (name, shape) in enumerate((("gate_up", (2 * INNER, HIDDEN)), ("down", (HIDDEN, INNER)))):
            weight = seeded(1, *shape, seed=2 * slot + n) / 8
            if kind == "none":
                getattr(experts, name).data.copy_(weight)
            else:
                codes, scale = quantize.get(kind, quantize_whole_rows)(weight)
                getattr(experts, name).view(torch.uint8).copy_(codes.view(torch.uint8))
                getattr(experts, f"{name}_scale").copy_(scale)
        made.append(experts.requires_grad_(False))
    return made


def layer(
    transport: Transport,
    kind: str,
    wire: Fp8Wire | None,
    hierarchy: str = "flat",
    backend: Backend = "torch",
    coded_before: bool = False,
) -> Tensor:
    """Dispatch, experts slot by slot, combine, of 4 tokens a rank of a world of 4, whoever holds them."""
    world_size, rank = transport.world_size, transport.rank
    mine = range(4 // world_size * rank, 4 // world_size * (rank + 1))
    x_TD = torch.cat([seeded(4, HIDDEN, seed=100 + r, dtype=torch.bfloat16) for r in mine])
    if coded_before:
        x_TD = Fp8Wire(HIDDEN).decode(Fp8Wire(HIDDEN).encode(x_TD), torch.bfloat16)
    ids_TK = torch.cat([torch.stack([torch.randperm(SLOTS, generator=g)[:TOP_K] for _ in range(4)])
                        for g in (torch.Generator().manual_seed(r) for r in mine)])  # fmt: skip
    weights_TK = torch.rand(4, TOP_K, generator=torch.Generator().manual_seed(9)).repeat(len(mine), 1)
    form = HierarchicalDispatcher if hierarchy == "node" else Dispatcher
    exchange = form(transport, SLOTS, HIDDEN, torch.bfloat16, backend, wire)
    experts = experts_for(kind, backend)
    with torch.no_grad():
        inbound = exchange.dispatch(x_TD, exchange.plan(ids_TK, weights_TK))  # type: ignore[arg-type]
        pieces, start = [], 0
        for local, end in enumerate(inbound.ends_L.tolist()):
            piece = one_slot(inbound, start, end)
            pieces.append(experts[SLOTS // world_size * rank + local](piece))
            start = end
        return exchange.combine(torch.cat(pieces), weights_TK, inbound)


def one_slot(inbound: Inbound, start: int, end: int) -> Inbound:
    rows, ids_R = inbound.rows_RD, inbound.row_ids_R
    rows_RD, ids_R = (rows[start:end], None) if ids_R is None else (rows, ids_R[start:end])
    ends_L = torch.tensor([end - start], dtype=torch.int32)
    return Inbound(rows_RD, ends_L, inbound.plan, ids_R, inbound.codec, inbound.dtype)


def everywhere(nodes: tuple[int, ...], kind: str, wire: Fp8Wire | None, coded_before: bool = False) -> Tensor:
    """All tokens' results, over as many ranks as stand on nodes."""
    hierarchy = "node" if max(nodes) else "flat"
    world = LocalWorld(len(nodes), topology=Topology(nodes))
    return torch.cat(world.run(lambda t: layer(t, kind, wire, hierarchy, coded_before=coded_before)))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["none", "fp8_block", "fp8_row"])
def test_bits_are_the_same_for_any_number_of_ranks(kind: str, early: bool) -> None:
    wire = Fp8Wire(HIDDEN, decode_on_arrival=early)
    alone, *others = (everywhere((0,) * ranks, kind, wire) for ranks in (1, 2, 4))
    assert all(torch.equal(alone, other) for other in others)


@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 1), (0, 0, 1, 1)])
def test_experts_in_fp8_give_the_bits_of_the_native_wire(nodes: tuple[int, ...]) -> None:
    assert torch.equal(everywhere(nodes, "fp8_block", None), everywhere(nodes, "fp8_block", Fp8Wire(HIDDEN)))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 1), (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("kind", ["none", "fp8_row"])
def test_rows_are_coded_once_however_far_they_go(kind: str, nodes: tuple[int, ...], early: bool) -> None:
    """What was coded and decoded beforehand and travels as it is gives the same bits."""
    wire = Fp8Wire(HIDDEN, decode_on_arrival=early)
    assert torch.equal(everywhere(nodes, kind, wire), everywhere(nodes, kind, None, coded_before=True))


def test_packed_experts_take_the_wire() -> None:
    experts = experts_for("none")[0]
    packed = experts.packed() if isinstance(experts, Experts) else experts
    wire, x_TD = Fp8Wire(HIDDEN), seeded(4, HIDDEN, dtype=torch.bfloat16)
    ids_R = torch.tensor([3, 1, 1])
    inbound = Inbound(wire.encode(x_TD), torch.tensor([3], dtype=torch.int32), None, ids_R, wire, torch.bfloat16)  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(packed(inbound), experts(inbound)) or not isinstance(packed, PackedExperts)


def test_the_plan_on_the_device_takes_the_wire() -> None:
    wire = Fp8Wire(HIDDEN, backend="triton")
    found = layer(LocalTransport(), "fp8_block", wire, backend="triton")
    assert torch.equal(found, layer(LocalTransport(), "fp8_block", None, backend="triton"))


@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 1)])
def test_gradients_go_straight_through(nodes: tuple[int, ...]) -> None:
    """As if the rows that arrive had been sent."""
    wire = Fp8Wire(40)

    def run(transport: Transport, coded: bool) -> tuple[Tensor, Tensor]:
        x_TD = seeded(5, 40, seed=transport.rank)
        x_TD = (x_TD if coded else wire.decode(wire.encode(x_TD), torch.float32)).requires_grad_()
        hierarchy = "node" if max(nodes) else "flat"
        exchange = make_dispatcher(transport, 4, 40, torch.float32, hierarchy=hierarchy, codec=wire if coded else None)
        ids_TK = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [-1, 2]])
        inbound = exchange.dispatch(x_TD, exchange.plan(ids_TK, torch.ones(5, 2)))
        assert inbound.codec is None and inbound.rows_RD.dtype == torch.float32
        y_TD = exchange.combine(inbound.rows_RD.square(), torch.ones(5, 2), inbound)
        y_TD.sum().backward()
        assert x_TD.grad is not None
        return y_TD.detach(), x_TD.grad

    world = LocalWorld(len(nodes), topology=Topology(nodes))
    for coded, plain in zip(*(world.run(lambda t, c=c: run(t, c)) for c in (True, False)), strict=True):  # type: ignore[misc]
        assert torch.equal(coded[0], plain[0]) and torch.equal(coded[1], plain[1])


def test_ranks_with_different_wires_are_named() -> None:
    def run(transport: Transport) -> None:
        codec = Fp8Wire(256) if transport.rank else None
        Dispatcher(transport, 4, 256, torch.bfloat16, codec=codec).plan(torch.zeros(1, 1, dtype=torch.int64))

    with pytest.raises(PlanMismatch, match="row bytes is 272 on rank 1, expected 512 as here"):
        LocalWorld(2).run(run)
