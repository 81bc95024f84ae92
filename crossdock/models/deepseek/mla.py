"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), over a paged cache of latents.

Legend: T tokens, D hidden, H heads, N nope width, R rotary width, V value width, C latent width (kv_lora_rank),
J context tokens.

Two forms that agree. Plain, for prompts: the latents are expanded to keys and values of every head. Absorbed, for
decoding: the key expansion moves into the query and the value expansion behind the average, so that all heads attend
to one shared row of C + R values a token and nothing is expanded:

    plain      score = q_nope . (W_UK c) + q_rope . k_rope        out = sum p (W_UV c)
    absorbed   score = (W_UK^T q_nope) . c + q_rope . k_rope      out = W_UV (sum p c)

A decoded token attends alone, by products of its own H rows: its bits depend neither on the other sequences of the
step nor on how many tokens of its own sequence are verified beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.linear import linear
from crossdock.models.blocks import Linear, RMSNorm, rotate_halves, rotate_interleaved
from crossdock.models.cache import Batch, PagedCache, Span
from crossdock.models.deepseek.config import DeepSeekConfig

LATENT_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps is


class MLA(nn.Module):
    """Names of the projections are the checkpoint's; `layer` is this layer's place in the cache."""

    def __init__(self, config: DeepSeekConfig, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.nope, self.rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        self.scale = (self.nope + self.rope) ** -0.5
        if config.rope.mscale_all_dim:
            self.scale *= config.rope.magnitude(config.rope.mscale_all_dim) ** 2
        self.rotate = rotate_interleaved if config.rope_interleave else rotate_halves
        size_D, bias = config.hidden_size, config.attention_bias
        query_size = self.heads * (self.nope + self.rope)
        self.q_proj = self.q_a_proj = self.q_b_proj = self.q_a_layernorm = None
        if config.q_lora_rank is None:
            self.q_proj = Linear(size_D, query_size, dtype, device)
        else:
            self.q_a_proj = Linear(size_D, config.q_lora_rank, dtype, device, bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype, device)
            self.q_b_proj = Linear(config.q_lora_rank, query_size, dtype, device)
        self.kv_a_proj_with_mqa = Linear(size_D, self.latent + self.rope, dtype, device, bias)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS, dtype, device)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value), dtype, device)
        self.o_proj = Linear(self.heads * self.value, size_D, dtype, device, bias)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, cache: PagedCache | None) -> Tensor:
        """[T, D] -> [T, D]. Writes this step's latents to `cache`; without one, spans are whole sequences."""
        q_THQ = self._queries(x_TD, rope)
        latent_TC = self._latents(x_TD, rope)
        if cache is None:
            y_TD: Tensor = self.o_proj(self._whole(q_THQ, latent_TC, len(batch.spans)))
            return y_TD
        cache.write(self.layer, batch.rows_T, latent_TC)
        out_THV = q_THQ.new_empty(len(x_TD), self.heads * self.value)
        for span in batch.spans:
            attend = self._absorbed if span.decode else self._plain
            out_THV[span.start : span.stop] = attend(q_THQ, cache.read(self.layer, span.rows), span)
        y_TD = self.o_proj(out_THV)
        return y_TD

    def _queries(self, x_TD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.q_proj is not None:
            q_TQ = self.q_proj(x_TD)
        else:
            assert self.q_a_proj is not None and self.q_a_layernorm is not None and self.q_b_proj is not None
            q_TQ = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))
        q_THQ = q_TQ.view(len(x_TD), self.heads, self.nope + self.rope)
        q_nope, q_rope = q_THQ.split((self.nope, self.rope), dim=-1)
        return torch.cat((q_nope, self.rotate(q_rope, rope)), dim=-1)

    def _latents(self, x_TD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        latent_TC, k_rope_TR = self.kv_a_proj_with_mqa(x_TD).split((self.latent, self.rope), dim=-1)
        return torch.cat((self.kv_a_layernorm(latent_TC), self.rotate(k_rope_TR[:, None], rope)[:, 0]), dim=-1)

    def _expand(self, latent_JC: Tensor) -> tuple[Tensor, Tensor]:
        """Latent rows [J, C + R] -> keys [J, H, N + R] and values [J, H, V]."""
        kv_JHX = self.kv_b_proj(latent_JC[:, : self.latent]).view(-1, self.heads, self.nope + self.value)
        k_nope, v_JHV = kv_JHX.split((self.nope, self.value), dim=-1)
        k_rope = latent_JC[:, None, self.latent :].expand(-1, self.heads, -1)
        return torch.cat((k_nope, k_rope), dim=-1), v_JHV

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, tokens, width] each -> [B, H, tokens, V]; values padded to the key width for the fused kernel."""
        width = self.nope + self.rope
        v = F.pad(v, (0, width - self.value)) if self.value < width else v
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return out[..., : self.value]

    def _whole(self, q_THQ: Tensor, latent_TC: Tensor, sequences: int) -> Tensor:
        k_THQ, v_THV = self._expand(latent_TC)
        q, k, v = (t.view(sequences, -1, *t.shape[1:]).transpose(1, 2) for t in (q_THQ, k_THQ, v_THV))
        return self._attend(q, k, v, None).transpose(1, 2).reshape(len(q_THQ), self.heads * self.value)

    def _plain(self, q_THQ: Tensor, latent_JC: Tensor, span: Span) -> Tensor:
        q = q_THQ[span.start : span.stop].transpose(0, 1)[None]
        k, v = (t.transpose(0, 1)[None] for t in self._expand(latent_JC))
        tokens = span.stop - span.start
        mask = None
        if tokens != span.context:
            mask = torch.ones(tokens, span.context, dtype=torch.bool, device=q.device).tril(span.context - tokens)
        return self._attend(q, k, v, mask)[0].transpose(0, 1).reshape(tokens, self.heads * self.value)

    def _absorbed(self, q_THQ: Tensor, latent_JC: Tensor, span: Span) -> Tensor:
        w_HXC = self.kv_b_proj.weight.view(self.heads, self.nope + self.value, self.latent)
        out = []
        for token in range(span.start, span.stop):
            context = span.context - (span.stop - 1 - token)
            q_nope, q_rope = torch.split(q_THQ[token], [self.nope, self.rope], dim=-1)
            q_latent = torch.bmm(q_nope[:, None], w_HXC[:, : self.nope])[:, 0]
            scores_HJ = linear(torch.cat((q_latent, q_rope), dim=-1), latent_JC[:context]) * self.scale
            probs_HJ = scores_HJ.softmax(-1, dtype=torch.float32).to(q_THQ.dtype)
            mean_HC = linear(probs_HJ, latent_JC[:context, : self.latent].T)
            out.append(torch.bmm(mean_HC[:, None], w_HXC[:, self.nope :].transpose(1, 2)).flatten())
        return torch.stack(out)
