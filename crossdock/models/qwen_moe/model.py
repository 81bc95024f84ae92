"""The Qwen3-MoE and Qwen2-MoE models: grouped-query attention over a paged cache, MoE layers.

Legend: T tokens on this rank, D hidden, H query heads, G key-value heads, Q head width, J context tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.backend import Backend
from crossdock.comm.transport import Transport
from crossdock.models.blocks import Linear, RMSNorm, Rotary, rotate_halves
from crossdock.models.cache import Batch, PagedCache, Span, in_batches
from crossdock.models.qwen_moe.config import QwenMoEConfig
from crossdock.moe import ExchangeConfig, MoELayer, SwigluMLP
from crossdock.moe.config import FLAT
from crossdock.moe.two_batch import Steps, run


class GQA(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with Qwen3's per-head norm of queries and keys, or Qwen2's biases.

    The cache holds a token's keys and values side by side, 2 * G * Q values.
    """

    def __init__(self, config: QwenMoEConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        size_D, bias = config.hidden_size, config.qkv_bias
        self.q_proj = Linear(size_D, self.heads * self.width, dtype, device, bias)
        self.k_proj = Linear(size_D, self.groups * self.width, dtype, device, bias)
        self.v_proj = Linear(size_D, self.groups * self.width, dtype, device, bias)
        self.o_proj = Linear(self.heads * self.width, size_D, dtype, device, config.output_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(self.width, config.rms_norm_eps, dtype, device)
            self.k_norm = RMSNorm(self.width, config.rms_norm_eps, dtype, device)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, cache: PagedCache | None) -> Tensor:
        """[T, D] -> [T, D]. Writes this step's keys and values to `cache`; without one, spans are whole sequences."""
        q_THQ = self.q_proj(x_TD).view(-1, self.heads, self.width)
        k_TGQ = self.k_proj(x_TD).view(-1, self.groups, self.width)
        v_TGQ = self.v_proj(x_TD).view(-1, self.groups, self.width)
        if self.q_norm is not None and self.k_norm is not None:
            q_THQ, k_TGQ = self.q_norm(q_THQ), self.k_norm(k_TGQ)
        q_THQ, k_TGQ = rotate_halves(q_THQ, rope), rotate_halves(k_TGQ, rope)
        if cache is not None:
            cache.write(self.layer, batch.rows_T, torch.cat((k_TGQ, v_TGQ), dim=1).flatten(1))
        out = []
        for span in batch.spans:
            if cache is None:
                keys, values = k_TGQ[span.start : span.stop], v_TGQ[span.start : span.stop]
            else:
                both = cache.read(self.layer, span.rows).view(-1, 2 * self.groups, self.width)
                keys, values = torch.split(both, self.groups, dim=1)
            attend = self._decode if span.decode else self._attend
            out.append(attend(q_THQ[span.start : span.stop], keys, values, span))
        y_TD: Tensor = self.o_proj(torch.cat(out) if out else x_TD.new_empty(0, self.heads * self.width))
        return y_TD

    def _attend(self, q_THQ: Tensor, k_JGQ: Tensor, v_JGQ: Tensor, span: Span) -> Tensor:
        """A prompt's queries over its context, [tokens, H * Q]."""
        context = (q_THQ, k_JGQ[: span.context], v_JGQ[: span.context])
        q, k, v = (t.transpose(0, 1)[None] for t in context)
        tokens, mask = len(q_THQ), None
        if 1 < tokens < span.context:
            mask = torch.ones(tokens, span.context, dtype=torch.bool, device=q.device).tril(span.context - tokens)
        causal = tokens == span.context
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(tokens, self.heads * self.width)

    def _decode(self, q_THQ: Tensor, k_JGQ: Tensor, v_JGQ: Tensor, span: Span) -> Tensor:
        """Tokens that continue a sequence, one by one over its whole pages, what is behind a token masked.

        By bmm, whose bits do not depend on the thread count when J is whole pages; those of torch's attention do for a
        single query on a CPU.
        """
        k_GQJ, v_GJQ = k_JGQ.permute(1, 2, 0), v_JGQ.transpose(0, 1)
        out = []
        for q_HQ, context in zip(q_THQ, range(span.context - len(q_THQ) + 1, span.context + 1), strict=True):
            scores_GSJ = torch.bmm((q_HQ * self.width**-0.5).view(self.groups, -1, self.width), k_GQJ)
            scores_GSJ[..., context:] = float("-inf")
            probs_GSJ = scores_GSJ.softmax(-1, dtype=torch.float32).to(v_GJQ.dtype)
            out.append(torch.bmm(probs_GSJ, v_GJQ).flatten())
        return torch.stack(out)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        config: QwenMoEConfig,
        layer: int,
        transport: Transport,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
        exchange: ExchangeConfig = FLAT,
    ) -> None:
        super().__init__()
        size_D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size_D, eps, dtype, device)
        self.self_attn = GQA(config, layer, dtype, device)
        self.post_attention_layernorm = RMSNorm(size_D, eps, dtype, device)
        self.mlp: SwigluMLP | MoELayer
        if config.moe_layers[layer]:
            self.mlp = MoELayer(config.moe, transport, exchange=exchange, dtype=dtype, device=device, backend=backend)
        else:
            self.mlp = SwigluMLP(size_D, config.intermediate_size, dtype, device, backend)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, cache: PagedCache | None) -> Tensor:
        return run(self.stages(x_TD, rope, batch, cache))

    def stages(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, cache: PagedCache | None
    ) -> Steps[Tensor]:
        """`forward`, pausing where `MoELayer.stages` does."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, batch, cache)
        normed_TD = self.post_attention_layernorm(x_TD)
        if isinstance(self.mlp, MoELayer):
            y_TD: Tensor = yield from self.mlp.stages(normed_TD)
        else:
            y_TD = self.mlp(normed_TD)
        return x_TD + y_TD


class QwenMoEModel(nn.Module):
    """A causal language model over flat tokens; every rank of `transport` calls `forward` together."""

    def __init__(
        self,
        config: QwenMoEConfig,
        transport: Transport,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
        exchange: ExchangeConfig = FLAT,
        two_batch: bool = False,
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config, self.two_batch = config, two_batch
        self.embed_tokens = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size, dtype=dtype, device=device))
        self.rotary = Rotary(config.rope, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer, transport, dtype, device, backend, exchange)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, device)

    @property
    def has_mtp(self) -> bool:
        """Never: this family has no MTP layer."""
        return False

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
        """Layers that keep rows in the cache."""
        return len(self.layers)

    @property
    def cache_width(self) -> int:
        """Values a token and layer: keys and values of all groups."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim

    def forward(self, ids_T: Tensor, batch: Batch, cache: PagedCache | None) -> Tensor:
        """int64 [T] -> hidden states [T, D] after the final norm."""
        return in_batches(self.stages, ids_T, batch, cache, self.two_batch)

    def stages(self, ids_T: Tensor, batch: Batch, cache: PagedCache | None) -> Steps[Tensor]:
        """`forward` of one batch, pausing where the layers do."""
        rope = self.rotary(batch.positions_T)
        x_TD: Tensor = F.embedding(ids_T, self.embed_tokens)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            x_TD = yield from layer.stages(x_TD, rope, batch, cache)
        x_TD = self.norm(x_TD)
        return x_TD

    def draft(self, next_ids_T: Tensor, hidden_TD: Tensor, batch: Batch, cache: PagedCache | None) -> Tensor:
        """Not to be called: `has_mtp` is False."""
        raise AssertionError("the model has no MTP layer")

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] -> fp32 [T, V]."""
        logits_TV: Tensor = self.lm_head(hidden_TD)
        return logits_TV.float()
