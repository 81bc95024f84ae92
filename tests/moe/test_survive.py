"""Layers that go on without a rank give the bits they gave with it, wherever an expert has a replica."""

import pytest
import torch
from torch import Tensor, nn

from crossdock import ExpertPlacement, LocalWorld, MoEConfig, MoELayer
from crossdock.comm import LocalTransport, Transport
from crossdock.errors import ConfigError, RankFailure
from crossdock.moe.layer import STANDING
from crossdock.moe.survive import go_on

CONFIG = MoEConfig(16, 8, 4, 2, shared_size=8)
PLACEMENT = ExpertPlacement(4, 3, (0, 1, 2, 3, 2, 3, 0, 1, 1, 0, 3, 2))
LAYERS = 2
WEIGHTS = ("gate_up", "down")


def inputs(rank: int) -> Tensor:
    return torch.randn(5 + rank, CONFIG.hidden_size, generator=torch.Generator().manual_seed(rank))


def model_of(transport: Transport, placement: ExpertPlacement) -> nn.Sequential:
    """The same model however its experts are placed."""
    layers = nn.Sequential(*(MoELayer(CONFIG, transport, placement, dtype=torch.float32) for _ in range(LAYERS)))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers:
            gate_up, down = (torch.randn(4, *getattr(layer.experts, n).shape[1:], generator=random) for n in WEIGHTS)
            for slot, expert in enumerate(placement.experts_of_rank(transport.rank)):
                layer.experts.gate_up[slot], layer.experts.down[slot] = gate_up[expert], down[expert]
            for name, parameter in layer.named_parameters():
                if not name.startswith("experts."):
                    parameter.copy_(torch.randn(parameter.shape, generator=random))
    return layers


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 2)])
def test_the_bits_are_those_of_a_run_without_the_lost_ranks(lost: tuple[int, ...]) -> None:
    left = [rank for rank in range(3) if rank not in lost]
    models: dict[int, nn.Sequential] = {}

    def before(transport: Transport) -> Tensor:
        models[transport.rank] = model_of(transport, PLACEMENT)
        result: Tensor = models[transport.rank](inputs(transport.rank))
        return result

    def after(transport: Transport) -> Tensor:
        rank = left[transport.rank]
        go_on(models[rank], transport, lost)
        result: Tensor = models[rank](inputs(rank))
        return result

    def from_the_start(transport: Transport) -> Tensor:
        result: Tensor = model_of(transport, PLACEMENT.without(lost))(inputs(left[transport.rank]))
        return result

    first = LocalWorld(3).run(before)
    second, fresh = (LocalWorld(len(left)).run(work) for work in (after, from_the_start))
    alone = model_of(LocalTransport(), ExpertPlacement.contiguous(4, 1))
    for place, rank in enumerate(left):
        assert torch.equal(second[place], fresh[place]) and torch.equal(second[place], first[rank])
        assert torch.equal(second[place], alone(inputs(rank)))


class Failing(LocalTransport):
    """Fails where the last of a model's layers makes its exchange, as one of several ranks may then be lost, too."""

    def register(self) -> int:
        if self._users == LAYERS - 1:
            raise RankFailure("rank 1 is gone")
        return super().register()


def test_a_failure_halfway_moves_no_layer() -> None:
    lost, placement = (1, 2), ExpertPlacement(4, 3, (0, 1, 2, 3) * 3)
    models: dict[int, nn.Sequential] = {}

    def before(transport: Transport) -> Tensor:
        models[transport.rank] = model_of(transport, placement)
        result: Tensor = models[transport.rank](inputs(transport.rank))
        return result

    expected = LocalWorld(3).run(before)[0]
    model = models[0]
    standing = [{name: getattr(layer, name) for name in STANDING} for layer in model]
    with pytest.raises(RankFailure, match="rank 1 is gone"):
        go_on(model, Failing(), lost)
    for layer, was in zip(model, standing, strict=True):
        assert all(getattr(layer, name) is value for name, value in was.items())
        assert layer.state_dict().keys() >= {"router.weight"} and "slots_EX" not in layer.state_dict()
    go_on(model, LocalTransport(), lost)
    assert torch.equal(model(inputs(0)), expected)


def test_a_layer_that_cannot_go_on_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its new exchange was made already."""

    def broken(*_: object) -> None:
        raise ConfigError("no pipeline")

    model = LocalWorld(3).run(lambda transport: model_of(transport, PLACEMENT))[0]
    layer, was = model[0], {name: getattr(model[0], name) for name in STANDING}
    monkeypatch.setattr("crossdock.moe.layer.Pipeline", broken)
    with pytest.raises(ConfigError, match="no pipeline"):
        LocalWorld(2).run(lambda t: layer.continue_on(t, PLACEMENT.without([2])) if t.rank == 0 else None)
    assert all(getattr(layer, name) is value for name, value in was.items())


def test_a_model_that_lost_an_expert_stays_as_it_was() -> None:
    thin = ExpertPlacement(4, 2, (0, 1, 2, 0, 3, -1))
    models = LocalWorld(2).run(lambda transport: model_of(transport, thin))
    with pytest.raises(RankFailure, match=r"experts \[3\] are lost"):
        go_on(models[0], LocalTransport(), [1])
    assert all(layer.placement == thin for layer in models[0])
