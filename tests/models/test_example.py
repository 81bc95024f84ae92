"""The bundled checkpoint: small enough to ship, a model of Python, drafting well, and the same to transformers."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer

from crossdock import LocalWorld, generate, load_model
from crossdock.comm import LocalTransport
from crossdock.models.cache import whole_sequences
from crossdock.models.deepseek.names import targets
from tests.models.checkpoints import greedy

DIRECTORY = Path(str(resources.files("crossdock"))) / "data" / "example"
CODE = '''
class Counter:
    """Counts how often each item was seen."""

    def __init__(self, items=None):
        self.counts = {}
        for item in items or []:
            self.add(item)

    def add(self, item, times=1):
        if times < 0:
            raise ValueError("times must not be negative")
        self.counts[item] = self.counts.get(item, 0) + times

    def __repr__(self):
        return "%s(%r)" % (self.__class__.__name__, self.counts)
'''
PROMPTS = ["def read_config(path):", "class Queue:\n    def __init__(self", "import os\nimport sys\n\n\ndef main("]


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(DIRECTORY, LocalTransport(), dtype=torch.float32).model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def reference(model: Any) -> Any:
    """transformers' model with the same values in float32, experts dequantised."""
    config = transformers.AutoConfig.from_pretrained(DIRECTORY)
    del config.quantization_config
    peer = transformers.DeepseekV3ForCausalLM(config).eval().float()
    state = peer.state_dict()
    for target in targets(model):
        name = target.sources[0].name
        if ".experts." in name:  # fused there: [E, 2F, D], gate above up, and [E, D, F]
            prefix, _, rest = name.partition(".experts.")
            expert, part = int(rest.split(".")[0]), rest.split(".")[1]
            if f"{prefix}.experts.down_proj" not in state:
                continue
            rows = slice(0, 128) if part == "gate_proj" else slice(128, 256)
            if part == "down_proj":
                state[f"{prefix}.experts.down_proj"][expert].copy_(target.into)
            else:
                state[f"{prefix}.experts.gate_up_proj"][expert, rows].copy_(target.into)
        elif name in state:
            state[name].copy_(target.into)
    return peer


def test_it_is_small_and_whole(model: Any) -> None:
    files = {file.name: file.stat().st_size for file in DIRECTORY.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sum(files.values()) < 25 * 2**20
    assert load_model(DIRECTORY, LocalTransport()).report.unused == ()
    assert model.has_mtp


def test_it_is_a_model_of_python(model: Any, tokenizer: Tokenizer) -> None:
    """Nats a token on code it has not seen, against the same tokens in another order; uniform would be 8.3."""

    def loss(ids: list[int]) -> float:
        ids_T = torch.tensor([0, *ids])
        with torch.no_grad():
            hidden_TD = model(ids_T[:-1], whole_sequences(1, len(ids_T) - 1, ids_T.device), None)
            return F.cross_entropy(model.logits(hidden_TD), ids_T[1:]).item()

    ids = tokenizer.encode(CODE).ids
    shuffled = [ids[i] for i in torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()]
    assert loss(ids) < 3.2 < 6.0 < loss(shuffled)


def test_its_router_is_used(model: Any, tokenizer: Tokenizer) -> None:
    layers = [module for module in model.modules() if hasattr(module, "load_E")]
    for layer in layers:
        layer.load_E.zero_()
    prompt = tokenizer.encode(CODE).ids
    generate(model, [prompt], LocalTransport(), max_new_tokens=8, draft_tokens=2)
    for layer in layers:
        assert int((layer.load_E > 0).sum()) >= 12, "fewer than 12 of the 16 experts were chosen"


def test_its_drafts_are_accepted_and_change_nothing(
    model: Any, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [tokenizer.encode(prompt).ids for prompt in [*PROMPTS, CODE]]
    plain = generate(model, prompts, LocalTransport(), max_new_tokens=40)
    found = generate(model, prompts, LocalTransport(), max_new_tokens=40, draft_tokens=2)
    assert found.outputs == plain.outputs
    with capsys.disabled():
        print(f"\nexample checkpoint: {found.accepted} of {found.drafted} drafts accepted")
    assert found.accepted / found.drafted > 0.4


def test_ranks_change_nothing(tokenizer: Tokenizer) -> None:
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]

    def run(transport: Any) -> tuple[str, list[list[int]]]:
        loaded = load_model(DIRECTORY, transport, dtype=torch.float32)
        found = generate(loaded.model, prompts, transport, max_new_tokens=12, draft_tokens=2)
        return found.digest, [output.token_ids for output in found.outputs]

    first = run(LocalTransport())
    assert first == run(LocalTransport()) == LocalWorld(2).run(run)[0] == LocalWorld(4).run(run)[3]


def test_transformers_decodes_the_same_tokens(model: Any, reference: Any, tokenizer: Tokenizer) -> None:
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        (output,) = generate(model, [ids], LocalTransport(), max_new_tokens=32).outputs
        assert output.token_ids == greedy(reference, ids, 32), prompt


def test_transformers_loads_the_directory(model: Any, tokenizer: Tokenizer) -> None:
    """As it stands, FP8 and all; it rounds dequantised experts to bfloat16, so logits are close and not equal."""
    options = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    peer = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32, **options).eval().float()
    ids = tokenizer.encode(CODE).ids
    with torch.no_grad():
        expected_TV = peer(torch.tensor([ids])).logits[0]
        hidden_TD = model(torch.tensor(ids), whole_sequences(1, len(ids), torch.device("cpu")), None)
        found_TV = model.logits(hidden_TD)
    assert (found_TV.argmax(-1) == expected_TV.argmax(-1)).float().mean() > 0.97
    torch.testing.assert_close(found_TV.log_softmax(-1), expected_TV.log_softmax(-1), rtol=0.0, atol=0.3)
    assert (found_TV - expected_TV).abs().mean() < 0.02
