"""The DeepSeek-V3 family: MLA, dense first layers, MoE layers, and a multi-token-prediction (MTP) layer.

Between layers the hidden states travel as two addends, what a block gave and what stood before it, so that the sum and
the norm that follows it are one launch on a GPU. A norm is always what comes next, be it the next layer's or the last.

Legend: T tokens on this rank, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.backend import Backend, resolve_backend
from crossdock.comm.transport import Transport
from crossdock.gemm.rms_norm import rms_norm
from crossdock.models.blocks import Linear, RMSNorm, Rotary
from crossdock.models.cache import Batch, PagedCache
from crossdock.models.deepseek.config import DeepSeekConfig
from crossdock.models.deepseek.mla import MLA
from crossdock.moe import MoELayer, SwigluMLP


def add_and_norm(norm: RMSNorm, x_TD: Tensor, residual_TD: Tensor | None, in_kernels: bool) -> tuple[Tensor, Tensor]:
    """(norm(h), h), where h = x + residual, or x where there is no residual yet."""
    if residual_TD is None:
        return norm(x_TD), x_TD
    if in_kernels:
        return rms_norm(x_TD, norm.weight, norm.eps, residual_TD, backend="triton")
    x_TD = residual_TD + x_TD
    return norm(x_TD), x_TD


class DecoderLayer(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); the mlp is dense in the first layers and MoE after them."""

    def __init__(
        self,
        config: DeepSeekConfig,
        layer: int,
        transport: Transport,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        size_D, eps = config.hidden_size, config.rms_norm_eps
        self.in_kernels = resolve_backend(backend, device) == "triton"
        self.input_layernorm = RMSNorm(size_D, eps, dtype, device)
        self.self_attn = MLA(config, layer, dtype, device, backend)
        self.post_attention_layernorm = RMSNorm(size_D, eps, dtype, device)
        self.mlp: SwigluMLP | MoELayer
        if layer < config.first_k_dense_replace:
            self.mlp = SwigluMLP(size_D, config.intermediate_size, dtype, device, backend)
        else:
            self.mlp = MoELayer(config.moe, transport, dtype=dtype, device=device, backend=backend)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        cache: PagedCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Two addends of the hidden states [T, D] (the second None before the first layer) -> two addends."""
        x_TD, residual_TD = add_and_norm(self.input_layernorm, x_TD, residual_TD, self.in_kernels)
        x_TD = self.self_attn(x_TD, rope, batch, cache)
        x_TD, residual_TD = add_and_norm(self.post_attention_layernorm, x_TD, residual_TD, self.in_kernels)
        return self.mlp(x_TD), residual_TD


class MTPLayer(nn.Module):
    """Predicts the token after next (arXiv:2412.19437, equations 21 to 23): a decoder layer over
    eh_proj([enorm(embedding of the next token); hnorm(hidden state)]), where the hidden state is the main model's
    after its final norm; embedding and output head are the main model's.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        layer: int,
        transport: Transport,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        size_D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(size_D, eps, dtype, device)
        self.hnorm = RMSNorm(size_D, eps, dtype, device)
        self.eh_proj = Linear(2 * size_D, size_D, dtype, device)
        self.block = DecoderLayer(config, layer, transport, dtype, device, backend)
        self.norm = RMSNorm(size_D, eps, dtype, device)

    def forward(
        self,
        next_TD: Tensor,
        hidden_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        cache: PagedCache | None,
    ) -> Tensor:
        """Embeddings of the next tokens and hidden states [T, D] -> hidden states that the output head reads."""
        x_TD = self.eh_proj(torch.cat((self.enorm(next_TD), self.hnorm(hidden_TD)), dim=-1))
        x_TD, residual_TD = self.block(x_TD, None, rope, batch, cache)
        return add_and_norm(self.norm, x_TD, residual_TD, self.block.in_kernels)[0]


class DeepSeekModel(nn.Module):
    """A causal language model over flat tokens; every rank of `transport` calls `forward` together.

    `mtp` is the first MTP layer, or None; only that one is used where a checkpoint holds several.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        transport: Transport,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.in_kernels = resolve_backend(backend, device) == "triton"
        self.embed_tokens = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.rotary = Rotary(config.rope, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, transport, dtype, device, backend) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, device)
        self.mtp: MTPLayer | None = None
        if config.num_nextn_predict_layers:
            self.mtp = MTPLayer(config, config.num_hidden_layers, transport, dtype, device, backend)

    @property
    def has_mtp(self) -> bool:
        """Whether `draft` can be called."""
        return self.mtp is not None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence [max_position_embeddings]."""
        return self.config.max_position_embeddings

    @property
    def cache_layers(self) -> int:
        """Layers that keep rows in the cache, the MTP layer included."""
        return len(self.layers) + (self.mtp is not None)

    @property
    def cache_width(self) -> int:
        """Values a token and layer: the latent and the shared rotary key."""
        return self.config.kv_lora_rank + self.config.qk_rope_head_dim

    def forward(self, ids_T: Tensor, batch: Batch, cache: PagedCache | None) -> Tensor:
        """int64 [T] -> hidden states [T, D] after the final norm."""
        rope = self.rotary(batch.positions_T)
        x_TD, residual_TD = F.embedding(ids_T, self.embed_tokens), None
        for layer in self.layers:
            x_TD, residual_TD = layer(x_TD, residual_TD, rope, batch, cache)
        return add_and_norm(self.norm, x_TD, residual_TD, self.in_kernels)[0]

    def draft(self, next_ids_T: Tensor, hidden_TD: Tensor, batch: Batch, cache: PagedCache | None) -> Tensor:
        """The MTP layer's hidden states [T, D], from the next tokens' ids and the main model's hidden states."""
        assert self.mtp is not None, "the model has no MTP layer"
        rope = self.rotary(batch.positions_T)
        drafted_TD: Tensor = self.mtp(F.embedding(next_ids_T, self.embed_tokens), hidden_TD, rope, batch, cache)
        return drafted_TD

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] -> fp32 [T, V]."""
        logits_TV: Tensor = self.lm_head(hidden_TD)
        return logits_TV.float()
