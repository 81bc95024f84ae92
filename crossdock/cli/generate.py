"""`crossdock generate`: text from a checkpoint, its experts spread over the ranks."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock.cli.exchange_options import (
    Chunks,
    Hierarchy,
    HierarchyOption,
    Mode,
    ModeOption,
    Trace,
    TwoBatch,
    Wire,
    WireOption,
    check_trace,
)
from crossdock.cli.launch import rank_command, run_ranks
from crossdock.cli.request import Request, read_request

if TYPE_CHECKING:
    from crossdock.cli.runtime import Runtime
    from crossdock.comm import Transport
    from crossdock.models.generate import Generation
    from crossdock.models.registry import Loaded
    from crossdock.models.sampling import Sampling
    from crossdock.moe import ExchangeConfig


class Dtype(str, Enum):
    """The dtypes a model can compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def generate(
    ctx: typer.Context,
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Hugging Face directory; the bundled example by default.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue (repeatable).", metavar="TEXT")] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option(help="Token ids to continue, 5,17,9 (repeatable).", metavar="IDS")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to generate per prompt; 64 by default, where the context has room."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Start this many ranks on this machine and spread the experts over them.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="What to compute in; the checkpoint's own by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU for each rank where there is one.")] = None,
    transport: Annotated[str, typer.Option(help="What carries rows: auto, local, torch, mpi or symmetric.")] = "auto",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    draft_tokens: Annotated[
        int | None,
        typer.Option(
            min=0, help="Most tokens the MTP layer drafts a step, which changes no token; 3 where there is one."
        ),
    ] = None,
    hierarchy: HierarchyOption = Hierarchy.flat,
    wire: WireOption = Wire.native,
    mode: ModeOption = Mode.throughput,
    chunks: Chunks = 1,
    two_batch: TwoBatch = False,
    trace: Trace = None,
    timeout: Annotated[float, typer.Option(max=1e6, help="Longest wait for another rank, in seconds.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")] = False,
) -> None:
    """Generates text, experts spread over the ranks."""
    request = read_request(checkpoint, prompt or [], prompt_ids or [], max_new_tokens, draft_tokens)
    check_trace(trace)
    if ranks is not None and not ctx.obj.is_rank:
        command = rank_command(ctx.obj.argv)  # also where it is 1: --ranks under torchrun is a mistake
        if ranks > 1:
            raise typer.Exit(run_ranks(command, ranks, debug=ctx.obj.debug, transport=transport))
    from crossdock.cli.runtime import join_ranks
    from crossdock.models.sampling import Sampling
    from crossdock.moe import ExchangeConfig
    from crossdock.moe.trace import traced

    bounded: Any = {"on_overflow": "grow"} if mode is Mode.latency else {}  # a prompt may be longer than a buffer
    exchange = ExchangeConfig(hierarchy.value, wire.value, mode.value, chunks=chunks, **bounded)
    sampling = Sampling(temperature, top_k, top_p, seed)
    with (
        join_ranks(device, transport, timeout) as runtime,
        traced(trace, runtime.transport, runtime.group.device) as link,
    ):
        model = _load(request, runtime, link, dtype, exchange, two_batch)
        result = _run(request, runtime, model, sampling, draft_tokens, as_json)
        answer = _answer(request, runtime, model, result)
        if runtime.group.rank == 0:  # told before the timeline is written, as that may fail
            _tell(answer, runtime, dtype, as_json)


def _tell(answer: dict[str, Any], runtime: "Runtime", dtype: Dtype | None, as_json: bool) -> None:
    """On stdout."""
    if as_json:
        print(json.dumps(answer), flush=True)
        return
    from crossdock.cli.show import show_generation

    why_dtype = "asked for" if dtype is not None else "the checkpoint's own"
    show_generation(answer, runtime.why | {"dtype": why_dtype})


def _load(
    request: Request,
    runtime: "Runtime",
    transport: "Transport",
    dtype: Dtype | None,
    exchange: "ExchangeConfig",
    two_batch: bool,
) -> "Loaded":
    """The model, with a progress bar on rank 0."""
    import torch

    from crossdock.cli.show import loading_bar
    from crossdock.models.registry import checkpoint_dtype, load_model

    compute = checkpoint_dtype(request.config) if dtype is None else getattr(torch, dtype.value)
    with loading_bar(shown=runtime.group.rank == 0) as progress:
        return load_model(
            request.directory,
            transport,
            dtype=compute,
            device=runtime.group.device,
            exchange=exchange,
            two_batch=two_batch,
            progress=progress,
        )


def _run(
    request: Request,
    runtime: "Runtime",
    loaded: "Loaded",
    sampling: "Sampling",
    draft_tokens: int | None,
    quiet: bool,
) -> "Generation":
    """Generates; on rank 0 a single prompt's text is shown as it comes."""
    from crossdock.cli.show import TextStream
    from crossdock.models.generate import DRAFT_TOKENS
    from crossdock.models.generate import generate as generate_tokens

    streaming = not quiet and runtime.group.rank == 0 and len(request.prompts) == 1
    stream = TextStream(request, sys.stdout) if streaming else None
    model: Any = loaded.model
    result = generate_tokens(
        model,
        request.prompts,
        runtime.transport,
        max_new_tokens=request.max_new_tokens,
        sampling=sampling,
        stop_ids=loaded.stop_ids,
        draft_tokens=draft_tokens if draft_tokens is not None else DRAFT_TOKENS if model.has_mtp else 0,
        dtype=next(model.parameters()).dtype,
        device=runtime.group.device,
        on_token=stream,
    )
    if stream is not None:
        stream.close()
    return result


def _answer(request: Request, runtime: "Runtime", loaded: "Loaded", result: "Generation") -> dict[str, Any]:
    """The object `--json` prints; a collective of all ranks, as the load of experts is summed over them."""
    generated = sum(len(output.token_ids) for output in result.outputs)
    fed = sum(len(prompt) for prompt in request.prompts)
    decoded = generated - len(result.outputs)  # a prompt's first token comes with its prefill
    seconds = result.prefill_s + result.decode_s
    return {
        "outputs": [
            {"prompt_ids": o.prompt_ids, "token_ids": o.token_ids, "text": request.text(o.token_ids)}
            for o in result.outputs
        ],
        "ranks": runtime.group.world_size,
        "transport": runtime.transport.name,
        "logits_digest": result.digest,
        "tokens_per_s": generated / seconds,
        "speculation": {"drafted": result.drafted, "accepted": result.accepted},
        "expert_load": expert_load(loaded.model, runtime),
        "prefill_tokens_per_s": fed / result.prefill_s,
        "decode_tokens_per_s": decoded / result.decode_s if decoded else 0.0,
        "device": str(runtime.group.device),
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
    }


def expert_load(model: Any, runtime: "Runtime") -> dict[str, Any]:
    """(token, expert) pairs that each rank's experts were given, over all MoE layers; balancedness is mean / max.

    The pairs of an expert with several replicas are divided evenly among them.
    """
    from crossdock.moe import MoELayer

    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    mine = [count for layer in layers for count in layer.load_E.tolist()]
    totals = [sum(counts) for counts in zip(*runtime.transport.all_gather(mine, "expert load"), strict=True)]
    per_rank = [0.0] * runtime.group.world_size
    at = 0
    for layer in layers:
        placement, replicas = layer.placement, layer.placement.replica_count_E.tolist()
        for slot, expert in enumerate(placement.physical_to_logical):
            if expert >= 0:
                per_rank[slot // placement.slots_per_rank] += totals[at + expert] / replicas[expert]
        at += len(replicas)
    largest = max(per_rank)
    balancedness = sum(per_rank) / len(per_rank) / largest if largest else 1.0
    return {"per_rank": [int(load) if load == int(load) else load for load in per_rank], "balancedness": balancedness}
