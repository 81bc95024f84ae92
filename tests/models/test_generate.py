"""Generation: speculation that changes no token, sampling by seed, ends of sequences, and input that cannot work."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crossdock import LocalWorld, generate, load_model
from crossdock.comm import LocalTransport, Transport
from crossdock.errors import CapacityOverflow, ConfigError, CrossdockError
from crossdock.models.generate import Generation
from crossdock.models.sampling import Sampling
from crossdock.moe import MoELayer
from tests.models.checkpoints import add_mtp, edit, save

PROMPTS = [[5, 17, 9, 33, 21, 4, 8], [3, 1, 4], [2, 7, 1, 8, 2, 8]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    save("deepseek_v3", directory)
    return directory


def run(directory: Path, transport: Transport, prompts: list[list[int]] = PROMPTS, **options: Any) -> Generation:
    model = load_model(directory, transport, dtype=torch.float32).model
    return generate(model, prompts, transport, **{"max_new_tokens": 30, **options})


@pytest.mark.parametrize("draft_tokens", [1, 3])
@pytest.mark.parametrize("predictable", [0.0, 0.85, 1.0])
def test_speculation_changes_no_token_and_no_bit(
    predictable: float, draft_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains go on here however unlikely they are, so that all of their lengths are met."""
    monkeypatch.setattr("crossdock.models.generate.LEAST_LIKELY", 0.0)
    save("deepseek_v3", tmp_path)
    add_mtp(tmp_path, predictable)
    expected = run(tmp_path, LocalTransport())
    assert expected.drafted == 0
    for world_size in (1, 2, 4):
        found = LocalWorld(world_size).run(lambda t: run(tmp_path, t, draft_tokens=draft_tokens))[0]
        assert found.outputs == expected.outputs
        assert found.drafted > 0
        rate = found.accepted / found.drafted
        assert rate == 1.0 if predictable == 1.0 else rate < 0.3 if predictable == 0.0 else 0.1 < rate < 1.0


def test_chains_go_on_where_they_are_likely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts on two ranks: their chains end at other passes, and the ranks must still agree on each."""
    save("deepseek_v3", tmp_path)
    add_mtp(tmp_path, 0.85)
    counts = {}
    for least in (0.0, 0.9, 2.0):
        monkeypatch.setattr("crossdock.models.generate.LEAST_LIKELY", least)
        found = LocalWorld(2).run(lambda t: run(tmp_path, t, draft_tokens=3))[0]
        counts[least] = found.drafted
        assert [output.token_ids for output in found.outputs] == [
            output.token_ids for output in run(tmp_path, LocalTransport()).outputs
        ]
    assert counts[0.0] > counts[0.9] > counts[2.0] > 0


def test_speculation_changes_no_sampled_token_either(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path)
    add_mtp(tmp_path, 0.85)
    sampling = Sampling(temperature=0.7, seed=3)
    expected = run(tmp_path, LocalTransport(), sampling=sampling)
    assert run(tmp_path, LocalTransport(), sampling=sampling, draft_tokens=2).outputs == expected.outputs


def test_sampling_follows_its_seed_on_any_number_of_ranks(plain: Path) -> None:
    def sampled(seed: int, world_size: int) -> list[list[int]]:
        options = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=seed)
        found = LocalWorld(world_size).run(lambda t: run(plain, t, sampling=options))[0]
        return [output.token_ids for output in found.outputs]

    assert sampled(1, 1) == sampled(1, 2) == sampled(1, 4) != sampled(2, 1)


def test_a_stop_id_ends_its_sequence_only(plain: Path) -> None:
    free = run(plain, LocalTransport()).outputs
    stop = free[0].token_ids[5]
    ended = run(plain, LocalTransport(), stop_ids=frozenset([stop])).outputs
    for before, after in zip(free, ended, strict=True):
        cut = before.token_ids.index(stop) + 1 if stop in before.token_ids else len(before.token_ids)
        assert after.token_ids == before.token_ids[:cut]


def test_the_context_ends_a_sequence(plain: Path) -> None:
    (output,) = run(plain, LocalTransport(), [[1] * 250], max_new_tokens=30).outputs
    assert len(output.token_ids) == 7  # positions 250 to 255, and the token after the last
    (output,) = run(plain, LocalTransport(), [[1] * 256], max_new_tokens=30).outputs
    assert len(output.token_ids) == 1


def test_tokens_are_told_as_they_come(plain: Path) -> None:
    told: list[tuple[int, int]] = []
    outputs = run(plain, LocalTransport(), on_token=lambda prompt, token: told.append((prompt, token))).outputs
    for number, output in enumerate(outputs):
        assert [token for prompt, token in told if prompt == number] == output.token_ids


@pytest.mark.parametrize(
    ("prompts", "options", "names"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([], {}, "at least one prompt"),
        ([[1, 97]], {}, "prompt 0 holds token id 97, expected 0 to 96"),
        ([[-1]], {}, "token id -1"),
        ([[1] * 257], {}, "prompt 0 has 257 tokens, the model's context 256"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ([[1]], {"draft_tokens": 1}, "no MTP layer"),
    ],
)
def test_bad_input_is_named(plain: Path, prompts: list[list[int]], options: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        run(plain, LocalTransport(), prompts, **options)


def test_logits_that_are_not_finite_end_it(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path)
    edit(tmp_path, {"lm_head.weight": torch.full((97, 64), float("nan"))})
    with pytest.raises(CrossdockError, match="prompt 0: the logits after 7 tokens are not finite"):
        run(tmp_path, LocalTransport())


def test_layers_are_checked_before_a_token_is_told(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device finds wrong in the last layer of a step ends it: tokens sampled after that mean nothing."""
    told: list[tuple[int, int]] = []
    checked: list[tuple[MoELayer, int]] = []
    monkeypatch.setattr(MoELayer, "check", lambda self: checked.append((self, len(told))))
    model = load_model(plain, LocalTransport(), dtype=torch.float32).model
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    options: Any = {"max_new_tokens": 3, "on_token": lambda prompt, token: told.append((prompt, token))}
    generate(model, PROMPTS[:1], LocalTransport(), **options)
    assert layers and checked == [(layer, step) for step in range(3) for layer in layers]

    def broken(self: MoELayer) -> None:
        raise CapacityOverflow("rank 1 has 9 rows for one rank")

    told.clear()
    monkeypatch.setattr(MoELayer, "check", broken)
    with pytest.raises(CapacityOverflow, match="rank 1 has 9 rows"):
        generate(model, PROMPTS[:1], LocalTransport(), **options)
    assert not told


def test_a_temperature_near_zero_is_greedy(plain: Path) -> None:
    expected = run(plain, LocalTransport()).outputs
    assert run(plain, LocalTransport(), sampling=Sampling(temperature=1e-300)).outputs == expected


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**options)


def test_decoding_follows_a_changed_weight(plain: Path) -> None:
    """What decoding derives from weights is derived anew when they change."""
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(plain, LocalTransport(), dtype=dtype).model
        other = load_model(plain, LocalTransport(), dtype=dtype).model
        generate(model, PROMPTS, LocalTransport(), max_new_tokens=4, dtype=dtype)
        for changed in (model, other):
            weight = changed.layers[1].self_attn.kv_b_proj.weight  # type: ignore[union-attr]
            weight.data.copy_(weight.flip(0))
        found = generate(model, PROMPTS, LocalTransport(), max_new_tokens=12, dtype=dtype)
        assert found.outputs == generate(other, PROMPTS, LocalTransport(), max_new_tokens=12, dtype=dtype).outputs
        for changed in (model, other):
            weight = changed.layers[1].self_attn.kv_b_proj.weight  # type: ignore[union-attr]
            weight.data = weight.flip(0)
        found = generate(model, PROMPTS, LocalTransport(), max_new_tokens=12, dtype=dtype)
        assert found.outputs == generate(other, PROMPTS, LocalTransport(), max_new_tokens=12, dtype=dtype).outputs
