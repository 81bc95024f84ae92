"""The DeepSeek-V3 family of models."""

from crossdock.models.deepseek.config import DeepSeekConfig
from crossdock.models.deepseek.model import DeepSeekModel

__all__ = ["DeepSeekConfig", "DeepSeekModel"]
