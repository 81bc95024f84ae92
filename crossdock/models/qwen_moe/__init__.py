"""The Qwen3-MoE and Qwen2-MoE models."""

from crossdock.models.qwen_moe.config import QwenMoEConfig
from crossdock.models.qwen_moe.model import QwenMoEModel

__all__ = ["QwenMoEConfig", "QwenMoEModel"]
