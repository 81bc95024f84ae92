"""`bench layer`: a whole MoE layer on one rank against transformers' block with the same weights.

Both of transformers' ways to run experts are measured; "transformers" is its grouped_mm one, which it takes by default.
Without transformers the ratio is left out.

Legend: T tokens, D hidden.
"""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from crossdock.cli.bench.report import AsJson, Device, Dtype, Plot, check_plot, choose, deliver, progress
from crossdock.cli.launch import RANK_THREADS

CASES = {"decode1": 1, "decode8": 8, "prefill2048": 2048}
CPU_SHAPE = {"hidden_size": 1024, "expert_size": 384, "num_experts": 64, "top_k": 8}
GPU_SHAPE = {"hidden_size": 2048, "expert_size": 768, "num_experts": 128, "top_k": 8}  # Qwen3-30B-A3B


def layer(
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="What both compute in.")] = Dtype.bfloat16,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both; as of a rank by default.")] = RANK_THREADS,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """A whole MoE layer, beside transformers' block with the same weights."""
    check_plot(plot)
    import torch

    from crossdock.cli.bench.launches import interpreted_launches
    from crossdock.cli.bench.timing import compare

    chosen, compute = choose(device, dtype)
    torch.set_num_threads(threads)
    shape = GPU_SHAPE if chosen.type == "cuda" else CPU_SHAPE
    torch.manual_seed(0)
    with torch.inference_mode():
        ours = _crossdock_layer(shape, chosen, compute)
        peers = _transformers_blocks(ours, shape, chosen, compute)
        ours.pack()
        x_TD = torch.randn(8, shape["hidden_size"], device=chosen).to(compute)
        ours(x_TD)
        launches = interpreted_launches() if chosen.type == "cpu" else _launches(ours, x_TD)
        cases = []
        for case, tokens in progress(CASES.items(), "MoE layer"):
            x_TD = torch.randn(tokens, shape["hidden_size"], device=chosen).to(compute)
            took = compare({"crossdock": _call(ours, x_TD)} | {n: _call(p, x_TD) for n, p in peers.items()}, chosen)
            cases.append(_row(case, tokens, took, str(chosen)) | {"difference": _difference(ours, peers, x_TD)})
    decoder = max(len(names) for kind, names in launches.items() if kind.startswith("decoder"))
    result = {"launches_per_layer": len(launches["none"]), "launches_per_decoder_layer": decoder, "launches": launches}
    result |= {"shape": shape | {"dtype": dtype.value}, "threads": threads}
    deliver(result | {"cases": cases}, "MoE layer", as_json, plot)


def _launches(layer: Any, x_TD: Any) -> dict[str, list[str]]:
    from crossdock.cli.bench.launches import decoder_launches, record_launches

    with record_launches(x_TD.device) as names:
        layer(x_TD)
    kinds = ("none", "fp8_block")
    return {"none": names} | {f"decoder {kind}": decoder_launches(kind, x_TD.device) for kind in kinds}


def _call(module: Callable[[Any], Any], x_TD: Any) -> Callable[[], Any]:
    return lambda: module(x_TD)


def _row(case: str, tokens: int, took: dict[str, float], device: str) -> dict[str, Any]:
    seconds = took.pop("crossdock")
    ratio = {peer: other / seconds for peer, other in took.items()}
    if took:
        ratio = {"transformers": ratio["transformers_grouped_mm"]} | ratio
    return {"case": case, "device": device, "us": seconds * 1e6, "tokens_per_s": tokens / seconds, "ratio": ratio}


def _difference(ours: Any, peers: dict[str, Any], x_TD: Any) -> float | None:
    """The median token's largest deviation from the peer over its largest value: the two must have computed the same.

    Not the worst token's: the peer rounds logits to the dtype, and near ties then go to other experts.
    """
    if not peers:
        return None
    expected_TD = next(iter(peers.values()))(x_TD).float()
    return float(((ours(x_TD).float() - expected_TD).abs().amax(1) / expected_TD.abs().amax(1)).median())


def _crossdock_layer(shape: dict[str, int], device: Any, dtype: Any) -> Any:
    from crossdock.comm import LocalTransport
    from crossdock.moe import MoEConfig, MoELayer

    ours = MoELayer(MoEConfig(**shape, score="softmax"), LocalTransport(), dtype=dtype, device=device)  # type: ignore[arg-type]
    for parameter in ours.parameters():
        parameter.normal_(std=shape["hidden_size"] ** -0.5)
    return ours.requires_grad_(False)


def _transformers_blocks(ours: Any, shape: dict[str, int], device: Any, dtype: Any) -> dict[str, Any]:
    """The peers by name, sharing the layer's own weights; none where transformers is not installed."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError:
        return {}
    blocks = {}
    for name in ("eager", "grouped_mm"):
        config = Qwen3MoeConfig(
            hidden_size=shape["hidden_size"],
            moe_intermediate_size=shape["expert_size"],
            num_experts=shape["num_experts"],
            num_experts_per_tok=shape["top_k"],
            norm_topk_prob=True,
        )
        config._experts_implementation = name
        block = Qwen3MoeSparseMoeBlock(config).to(device=device, dtype=dtype).requires_grad_(False)
        block.gate.weight.data = ours.router.weight.data.to(dtype)
        block.experts.gate_up_proj.data, block.experts.down_proj.data = (
            ours.experts.gate_up.data,
            ours.experts.down.data,
        )
        blocks[f"transformers_{name}"] = _Flat(block)
    return blocks


class _Flat:
    """Gives flat tokens the batch dimension transformers wants."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __call__(self, x_TD: Any) -> Any:
        return self.block(x_TD[None])[0]
