"""One contender of `bench generate` in a process of its own: a JSON job on stdin, one JSON line of figures on stdout.

prefill_s is until the first token after `prompt`, and long_decode_s for `new_tokens` tokens after that; decode_s for as
many after `short_prompt`; batch 1, all after a warm-up.
peak_rss_bytes is the process's peak after loading, before anything runs; idle_rss_bytes is its peak before loading.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Figures = tuple[float, float]  # prefill_s, decode_s


def _peak_rss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _crossdock(job: dict[str, Any], dtype: torch.dtype, plain: bool) -> Callable[[list[int]], Figures]:
    from crossdock.comm import LocalTransport
    from crossdock.models.generate import DRAFT_TOKENS, generate
    from crossdock.models.registry import load_model

    transport = LocalTransport()
    model: Any = load_model(job["directory"], transport, dtype=dtype).model
    drafts = DRAFT_TOKENS if model.has_mtp and not plain else 0

    def run(prompt: list[int]) -> Figures:
        count = job["new_tokens"] + 1
        done = generate(model, [prompt], transport, max_new_tokens=count, draft_tokens=drafts, dtype=dtype)
        return done.prefill_s, done.decode_s

    return run


def _transformers(job: dict[str, Any], dtype: torch.dtype) -> Callable[[list[int]], Figures]:
    import transformers as installed

    transformers: Any = installed
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(job["directory"])
    options = {}
    if getattr(config, "quantization_config", None):
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(job["directory"], dtype=dtype, **options).eval()

    def timed(prompt: list[int], count: int) -> float:
        ids = torch.tensor([prompt])
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + count
        return time.perf_counter() - began

    def run(prompt: list[int]) -> Figures:
        prefill_s = timed(prompt, 1)
        return prefill_s, timed(prompt, job["new_tokens"] + 1) - prefill_s

    return run


def main() -> None:
    """Runs the job on stdin."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job["dtype"])
    idle, began = _peak_rss(), time.perf_counter()
    if job["contender"] == "transformers":
        run = _transformers(job, dtype)
    else:
        run = _crossdock(job, dtype, plain=job["contender"] == "crossdock_plain")
    load_s, peak = time.perf_counter() - began, _peak_rss()
    prompt, short = job["prompt"], job["short_prompt"]
    run(prompt)
    prefill_s, long_decode_s = (min(figure) for figure in zip(run(prompt), run(prompt), strict=True))
    _, decode_s = (min(figure) for figure in zip(run(short), run(short), strict=True))
    figures = {"load_s": load_s, "idle_rss_bytes": idle, "peak_rss_bytes": peak}
    print(json.dumps(figures | {"prefill_s": prefill_s, "decode_s": decode_s, "long_decode_s": long_decode_s}))


if __name__ == "__main__":
    main()
