"""`bench router`: router product and expert selection against F.linear and topk of torch.

Legend: T tokens, D hidden, E experts, K experts per token.
"""

from typing import Any

from crossdock.cli.bench.report import AsJson, Device, DtypeOption, Plot, check_plot, choose, deliver, progress

HIDDEN, EXPERTS, TOP_K = 7168, 256, 8  # DeepSeek-V3
TOKENS = (1, 8, 64, 512, 4096)


def router(device: Device = None, dtype: DtypeOption = None, plot: Plot = None, as_json: AsJson = False) -> None:
    """Router product and expert selection, beside F.linear + topk."""
    check_plot(plot)
    from dataclasses import asdict

    import torch

    from crossdock.cli.bench.timing import measure_ceilings

    chosen, compute = choose(device, dtype)
    ceilings = measure_ceilings(chosen, compute)
    torch.manual_seed(0)
    weight_ED = torch.randn(EXPERTS, HIDDEN, device=chosen).div(HIDDEN**0.5).to(compute)
    with torch.no_grad():
        cases = [_case(tokens, weight_ED, ceilings) for tokens in progress(TOKENS, "router")]
    deliver({"ceilings": asdict(ceilings), "cases": cases}, "router", as_json, plot)


def _case(tokens: int, weight_ED: Any, ceilings: Any) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from crossdock.cli.bench.timing import compare
    from crossdock.routing import router_gemm, select_experts

    device = weight_ED.device
    x_TD = torch.randn(tokens, HIDDEN, device=device).to(weight_ED.dtype)

    def builtin() -> Any:
        scores_TE = F.linear(x_TD, weight_ED).float().softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(TOP_K, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK

    def ours() -> Any:
        return select_experts(router_gemm(x_TD, weight_ED), top_k=TOP_K, score="softmax")

    took = compare({"crossdock": ours, "torch": builtin, "select": _select_only(x_TD, weight_ED)}, device)
    operations = 2.0 * tokens * HIDDEN * EXPERTS
    moved = x_TD.nbytes + weight_ED.nbytes + tokens * TOP_K * 12  # ids int64, weights float32
    seconds = took["crossdock"]
    return {
        "case": f"T={tokens} D={HIDDEN} E={EXPERTS} K={TOP_K} {str(weight_ED.dtype).removeprefix('torch.')}",
        "device": str(device),
        "us": seconds * 1e6,
        "select_us": took["select"] * 1e6,
        "tflops": operations / seconds / 1e12,
        "gbytes_per_s": moved / seconds / 1e9,
        "of_ceiling": ceilings.share(operations, moved, seconds),
        "ratio": {"linear+topk": took["torch"] / seconds},
    }


def _select_only(x_TD: Any, weight_ED: Any) -> Any:
    from crossdock.routing import router_gemm, select_experts

    logits_TE = router_gemm(x_TD, weight_ED)
    return lambda: select_experts(logits_TE, top_k=TOP_K, score="softmax")
