"""`bench router`: the router's product with the selection of experts, and selection alone, beside F.linear and topk.

On a GPU inputs are warm, many calls in one graph, as a router's are in use: its rows were written just before. The peer
does less than we do: it knows no groups and no bias.

Legend: T tokens, D hidden, E experts, K experts per token.
"""

from typing import Any

from crossdock.cli.bench.report import AsJson, Device, DtypeOption, Plot, check_plot, choose, deliver, progress

DEEPSEEK = {"top_k": 8, "score": "sigmoid", "num_groups": 8, "top_groups": 4, "scale": 2.5, "selection_bias": True}
KIMI = {"top_k": 8, "score": "sigmoid", "scale": 2.827, "selection_bias": True}
QWEN = {"top_k": 8, "score": "softmax"}
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {  # D, E, options of Router
    "deepseek-v3": (7168, 256, DEEPSEEK),
    "kimi-k2": (7168, 384, KIMI),
    "qwen3-235b": (4096, 128, QWEN),
}
CPU_ROUTERS = ("deepseek-v3",)
TOKENS = {"cpu": (1, 8, 64, 512, 4096), "cuda": (1, 8, 16, 64, 256, 8192)}


def router(device: Device = None, dtype: DtypeOption = None, plot: Plot = None, as_json: AsJson = False) -> None:
    """Router product and expert selection, and selection alone, beside F.linear + topk."""
    check_plot(plot)
    from dataclasses import asdict

    import torch

    from crossdock.cli.bench.timing import measure_ceilings

    chosen, compute = choose(device, dtype)
    ceilings = measure_ceilings(chosen, compute)
    torch.manual_seed(0)
    names = CPU_ROUTERS if chosen.type == "cpu" else tuple(ROUTERS)
    planned = [(name, tokens) for name in names for tokens in TOKENS["cpu" if chosen.type == "cpu" else "cuda"]]
    cases: list[dict[str, Any]] = []
    with torch.no_grad():
        for name, tokens in progress(planned, "router"):
            cases += _cases(name, tokens, chosen, compute, ceilings)
    deliver({"ceilings": asdict(ceilings), "cases": cases}, "router", as_json, plot)


def _cases(name: str, tokens: int, device: Any, dtype: Any, ceilings: Any) -> list[dict[str, Any]]:
    """Two lines of the result: the whole router, and its selection alone."""
    import torch
    import torch.nn.functional as F

    from crossdock.cli.bench.timing import compare
    from crossdock.routing import Router, router_gemm, select_experts

    hidden, experts, options = ROUTERS[name]
    layer = Router(hidden, experts, dtype=dtype, device=device, **options).requires_grad_(False)
    layer.weight.normal_(std=hidden**-0.5)
    x_TD = torch.randn(tokens, hidden, device=device, dtype=dtype)
    logits_TE = router_gemm(x_TD, layer.weight)
    rule = {key: value for key, value in options.items() if key != "selection_bias"}
    bias_E, top_k = layer.e_score_correction_bias, options["top_k"]

    def topk(scores_TE: Any) -> Any:
        scores_TE = scores_TE.sigmoid() if options["score"] == "sigmoid" else scores_TE.softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    contenders = {
        "router": lambda: layer(x_TD),
        "linear+topk": lambda: topk(F.linear(x_TD, layer.weight).float()),
        "topk": lambda: select_experts(logits_TE, bias_E=bias_E, **rule),
        "torch_topk": lambda: topk(logits_TE),
    }
    if device.type != "cpu":  # where it is what we call anyway
        reference = Router(hidden, experts, dtype=dtype, device=device, backend="torch", **options)
        reference.load_state_dict(layer.state_dict())
        contenders["reference"] = lambda: reference(x_TD)
    took = compare(contenders, device, flush=False)
    shape = f"T={tokens} E={experts} K={top_k}"
    chosen_bytes = tokens * top_k * 12  # ids int64, weights float32
    operations = 2.0 * tokens * hidden * experts
    moved = x_TD.nbytes + layer.weight.nbytes + chosen_bytes
    whole = _line(f"{name} router {shape} D={hidden}", took["router"], operations, moved, ceilings)
    peers = [name for name in ("linear+topk", "reference") if name in took]
    whole["ratio"] = {name: took[name] / took["router"] for name in peers}
    alone = _line(f"{name} topk {shape}", took["topk"], 0.0, logits_TE.nbytes + chosen_bytes, ceilings)
    alone["ratio"] = {"torch_topk": took["torch_topk"] / took["topk"]}
    for line in (whole, alone):
        line |= {"device": str(device), "select_us": took["topk"] * 1e6, "eager": list(took.eager) or None}
    return [whole, alone]


def _line(case: str, seconds: float, operations: float, moved: float, ceilings: Any) -> dict[str, Any]:
    return {
        "case": case,
        "us": seconds * 1e6,
        "tflops": operations / seconds / 1e12,
        "gbytes_per_s": moved / seconds / 1e9,
        "of_ceiling": ceilings.share(operations, moved, seconds),
    }
