# mypy: disable-error-code="attr-defined, no-untyped-def, untyped-decorator"
"""A rank that is alone: the shared expert as one more group of the routed experts' products, in front of them.

Where a shared expert has the inner size of a routed one (DeepSeek-V3, Kimi K2), its weights stand in front of theirs in
one tensor, of which both modules hold their part, and every token is a row of its group:

    weights    | shared | slot 0 | slot 1 | ...
    rows       | token 0 1 2 ... T-1 | those of slot 0 | of slot 1 | ... | no expert
    results    | plus_TD             | what is weighted and added up               |

So a layer is six launches where it was nine: two to route, one that orders the rows, two products and the sum. Each row
has the bits that it has where the shared expert is computed by itself (`moe.mlp`), and the sum is rounded before the
shared expert's row is added, as ever: worlds of one and of many agree.

Rejected: the shared expert behind the routed ones, as only the device knows where those end, and the sum needs its rows
as a tensor; as an expert that every token chooses with a weight of one, as its row would be added before the rounding;
a copy of its weights beside the routed ones once they are loaded, as two copies of a layer exist for a moment.

Legend: T tokens, D hidden, K experts per token, N choices (T * K), P slots, G groups (P + 1), R rows (T + N).
"""

import torch
from torch import Tensor, nn

from crossdock._audit_spec import KernelSpec
from crossdock._triton import tl, triton
from crossdock.backend import Backend, resolve_backend
from crossdock.comm.combine_kernel import weighted_sum_triton
from crossdock.comm.plan_kernel import number_rows, place_rows_ref
from crossdock.gemm import Codes
from crossdock.moe.config import MoEConfig
from crossdock.moe.experts import Experts, Fp8Experts, PackedExperts, make_experts
from crossdock.moe.mlp import Fp8MLP, SwigluMLP, make_shared_experts

BLOCK = 1024  # choices, or tokens, a step

AnyExperts = Experts | PackedExperts | Fp8Experts
Placed = tuple[Tensor, Tensor, Tensor]  # token_R, position_TK, ends_G, all int32


def make_both(
    config: MoEConfig, num_slots: int, world_size: int, dtype: torch.dtype, device: torch.device, backend: Backend
) -> tuple[Experts | Fp8Experts, SwigluMLP | Fp8MLP | None]:
    """A rank's experts and its shared expert, in one piece of memory where `alone` can serve them together."""
    joins = world_size == 1 and resolve_backend(backend, device) == "triton" and _same_form(config)
    experts = make_experts(config, num_slots, dtype, device, backend, before=int(joins))
    shared = make_shared_experts(config, dtype, device, backend)
    if joins:
        for name in experts.NAMES:
            held = getattr(experts, name)
            in_front = held.detach().as_strided(held.shape[1:], held.stride()[1:], 0)
            setattr(shared, name, nn.Parameter(in_front) if isinstance(held, nn.Parameter) else in_front)
    return experts, shared


def _same_form(config: MoEConfig) -> bool:
    """Whether the shared expert could be a routed one; with one scale a row its weights are not held as theirs are."""
    return config.shared_size == config.expert_size and not config.shared_gate and config.quant.kind != "fp8_row"


def joined_weights(experts: AnyExperts, shared: nn.Module | None) -> list[Tensor] | None:
    """Both modules' weights as [P + 1, ...], in the order of NAMES; None where they do not stand together (any more).

    They part where a module is copied or moved to another device or dtype.
    """
    if isinstance(experts, PackedExperts) or not experts.before or shared is None:
        return None
    joined = []
    for name in experts.NAMES:
        held, first = getattr(experts, name), getattr(shared, name)
        if held.storage_offset() != first.numel() or held.data_ptr() != first.data_ptr() + first.nbytes:
            return None
        joined.append(first.detach().as_strided((len(held) + 1, *first.shape), held.stride()))
    return joined


def alone(
    experts: AnyExperts,
    shared: nn.Module | None,
    x_TD: Tensor,
    slot_ids_TK: Tensor,
    weights_TK: Tensor,
    codes: Codes | None = None,
) -> Tensor | None:
    """The result of a layer whose rows all stay here, in four launches behind the routing (five where FP8 experts are
    not given the tokens' `codes`); None where the shared expert is none of the routed experts' groups, or where
    gradients are enabled.

    slot_ids_TK  int64, 0..P-1 or no expert, not checked: that would wait for the device
    weights_TK   float32
    """
    weights = None if torch.is_grad_enabled() else joined_weights(experts, shared)
    if weights is None or isinstance(experts, PackedExperts):
        return None
    tokens = len(x_TD)
    token_R, position_TK, ends_G = place_rows_and_tokens_triton(slot_ids_TK, len(weights[0]) - 1)
    rows = codes if codes is not None and isinstance(experts, Fp8Experts) else x_TD
    out_RD = experts.multiply(rows, ends_G, token_R, *weights)
    return weighted_sum_triton(out_RD[tokens:], weights_TK, position_TK, out_RD[:tokens])


def place_rows_and_tokens_ref(slot_ids_TK: Tensor, num_slots: int) -> Placed:
    """The specification: a stable sort of the choices by slot, no expert last, behind all tokens as a group."""
    _, token_N, position_TK, ends_P = place_rows_ref(slot_ids_TK, num_slots)
    token_T = torch.arange(len(slot_ids_TK), dtype=torch.int32, device=slot_ids_TK.device)
    none_0 = ends_P.new_zeros(1)
    return torch.cat((token_T, token_N)), position_TK, torch.cat((none_0, ends_P)) + len(slot_ids_TK)


@triton.jit
def place_rows_and_tokens_kernel(
    slot_ids_ptr,  # [N] int64
    token_ptr,  # [T + N] int32
    position_ptr,  # [N] int32, counted from row T
    ends_ptr,  # [P + 1] int32
    T,
    N,
    P,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 has the tokens, 1 + p the choices of slot p, and P + 1 those of no expert."""
    slot = tl.program_id(0) - 1
    if slot < 0:
        for first in range(0, T, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(token_ptr + at, at, mask=at < T)
        tl.store(ends_ptr, T)
    else:
        end = number_rows(slot_ids_ptr, None, token_ptr + T, position_ptr, slot, N, P, K, BLOCK)
        tl.store(ends_ptr + 1 + slot, T + end, mask=slot < P)


def place_rows_and_tokens_triton(slot_ids_TK: Tensor, num_slots: int) -> Placed:
    """`place_rows_and_tokens_ref` in one launch."""
    (tokens, top_k), device = slot_ids_TK.shape, slot_ids_TK.device
    token_R = torch.empty(tokens * (top_k + 1), dtype=torch.int32, device=device)
    position_TK = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    ends_G = torch.empty(num_slots + 1, dtype=torch.int32, device=device)
    place_rows_and_tokens_kernel[(num_slots + 2,)](
        slot_ids_TK.contiguous(),
        token_R,
        position_TK,
        ends_G,
        tokens,
        tokens * top_k,
        num_slots,
        K=top_k,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return token_R, position_TK, ends_G


AUDIT = [
    KernelSpec(
        name="place_rows_and_tokens",
        kernel=place_rows_and_tokens_kernel,
        config=f"K=8, {BLOCK} choices a step",
        signature={"slot_ids_ptr": "*i64"}
        | dict.fromkeys(("token_ptr", "position_ptr", "ends_ptr"), "*i32")
        | dict.fromkeys(("T", "N", "P"), "i32")
        | dict.fromkeys(("K", "BLOCK"), "constexpr"),
        constexprs={"K": 8, "BLOCK": BLOCK},
    )
]
