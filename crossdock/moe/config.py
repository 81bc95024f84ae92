"""`MoEConfig`: the one place where the options of an MoE layer are defined and checked."""

from dataclasses import dataclass
from typing import Literal

from crossdock.errors import ConfigError
from crossdock.gemm import QuantSpec

NOT_QUANTIZED = QuantSpec()


@dataclass(frozen=True)
class MoEConfig:
    """Shape and rules of one MoE layer; names of the Hugging Face `config.json` fields in brackets.

    hidden_size     D [hidden_size]
    expert_size     F, inner size of one routed expert [moe_intermediate_size]
    num_experts     E [n_routed_experts, num_experts]
    top_k           K, experts per token [num_experts_per_tok]
    score           how logits become scores: "sigmoid" (DeepSeek-V3), "softmax" (Qwen), "sqrtsoftplus"
    num_groups      groups the experts are divided into for group-limited routing [n_group]
    top_groups      groups a token may choose from [topk_group]
    renormalize     divide a token's weights by their sum [norm_topk_prob]
    scale           factor on the weights after that [routed_scaling_factor]
    selection_bias  a bias per expert that takes part in selection only [e_score_correction_bias]
    shared_size     inner size of the shared expert, 0 where there is none
    shared_gate     a sigmoid gate on the shared expert's output (Qwen2-MoE)
    quant           how expert weights are held and multiplied
    """

    hidden_size: int
    expert_size: int
    num_experts: int
    top_k: int
    score: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    renormalize: bool = True
    scale: float = 1.0
    selection_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    quant: QuantSpec = NOT_QUANTIZED

    def __post_init__(self) -> None:
        for name in ("hidden_size", "expert_size", "num_experts", "top_k", "num_groups", "top_groups"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("shared_size", self.shared_size, 0)
        if self.num_experts % self.num_groups:
            raise ConfigError(f"num_experts {self.num_experts} is no multiple of num_groups {self.num_groups}")
        if self.top_groups > self.num_groups:
            raise ConfigError(f"top_groups {self.top_groups} is more than num_groups {self.num_groups}")
        reachable = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > reachable:
            raise ConfigError(
                f"top_k {self.top_k} is more than the {reachable} experts in top_groups {self.top_groups}"
            )
        if self.shared_gate and not self.shared_size:
            raise ConfigError("shared_gate is set but shared_size is 0")


@dataclass(frozen=True)
class ExchangeConfig:
    """How an MoE layer's rows travel. The defaults give the same bits for any number of ranks.

    hierarchy     "flat": a row for each (token, expert), or (token, rank) where that saves much. "node": a token
                  crosses to a node once, its results are summed there, and one row returns: fewer bytes between nodes,
                  and bits that depend on which ranks share one
    wire          "native": rows travel in the layer's dtype. "fp8": dispatched rows travel as e4m3 with a scale for
                  each 128 values; the same bits as native for experts held in fp8_block, which quantise so anyhow
    mode          "throughput": exact sizes, counts are exchanged first. "latency": bounded buffers, no host
                  synchronisation, for decoding (needs the symmetric transport)
    max_tokens    latency mode: most tokens of one rank in one call
    capacity      latency mode: rows one rank can send to another in one call; 0: as many as can occur
    on_overflow   latency mode, where capacity is too small: "raise" CapacityOverflow, or "grow" and go again
    chunks        parts a layer's tokens are worked on in, one travelling while another computes; 0: by a cost model;
                  the bits are the same for any number. On GPUs with transport symmetric chunks hide little: what
                  computes waits for all that was launched for rows so far, those of the next chunk included

    "node" where all ranks share one node is "flat": nothing crosses. In a world of one nothing travels, in any mode.

    In latency mode on a GPU, what is wrong (an overflow, a rank that is missing) is found by the device and raised by a
    later call, or by `MoELayer.check`: call that before results of the last layer are used. There an overflow with
    on_overflow "raise" is final for the group: every later call raises it again.
    """

    hierarchy: Literal["flat", "node"] = "flat"
    wire: Literal["native", "fp8"] = "native"
    mode: Literal["throughput", "latency"] = "throughput"
    max_tokens: int = 128
    capacity: int = 0
    on_overflow: Literal["raise", "grow"] = "raise"
    chunks: int = 1

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name, least in (("max_tokens", 1), ("capacity", 0), ("chunks", 0)):
            _check_integer(name, getattr(self, name), least)
        if self.mode == "latency" and self.chunks != 1:
            raise ConfigError(f"mode 'latency' sends all rows at once: chunks must be 1, found {self.chunks}; for "
                              "chunks use mode 'throughput'")  # fmt: skip
        if self.mode == "latency" and self.hierarchy != "flat":
            raise ConfigError("mode 'latency' sends straight to each rank: hierarchy must be 'flat', found "
                              f"{self.hierarchy!r}; to cross to a node once use mode 'throughput'")  # fmt: skip
        unused = [name for name in _OF_LATENCY if getattr(self, name) != _OF_LATENCY[name]]
        if self.mode != "latency" and unused:
            raise ConfigError(f"{' and '.join(unused)} bound the buffers of mode 'latency', and nothing in mode "
                              f"{self.mode!r}: leave them out, or set mode='latency'")  # fmt: skip

    def check_transport(self, name: str, world_size: int) -> None:
        """Raises ConfigError where that transport cannot serve the mode."""
        if self.mode == "latency" and world_size > 1 and name != "symmetric":
            raise ConfigError(f"mode 'latency' needs transport 'symmetric', found {name!r}: choose that transport, or "
                              "mode 'throughput'")  # fmt: skip


_CHOICES = {
    "hierarchy": ("flat", "node"),
    "wire": ("native", "fp8"),
    "mode": ("throughput", "latency"),
    "on_overflow": ("raise", "grow"),
}
_OF_LATENCY = {"max_tokens": 128, "capacity": 0, "on_overflow": "raise"}  # with their defaults


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, found {value!r}")


FLAT = ExchangeConfig()
