"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), over a paged cache of latents.

Legend: T tokens, D hidden, H heads, N nope width, R rotary width, V value width, C latent width (kv_lora_rank),
J context tokens.

Two forms that agree. Plain, for prompts: the latents are expanded to keys and values of every head. Absorbed, for
decoding: the key expansion moves into the query and the value expansion behind the average, so that all heads attend
to one shared row of C + R values a token and nothing is expanded:

    plain      score = q_nope . (W_UK c) + q_rope . k_rope        out = sum p (W_UV c)
    absorbed   score = (W_UK^T q_nope) . c + q_rope . k_rope      out = W_UV (sum p c)

A decoded token's bits depend neither on the other sequences of the step nor on how many tokens of its own sequence are
verified beside it: every product has a fixed shape or rows that do not depend on their company. On a CPU the absorbed
form is computed in float32 whatever the model's dtype: its products are small, and oneDNN's bfloat16 ones take three
times as long.

On a GPU a step with a cache takes few launches, the same for any number of sequences: seven a layer where all decode,
of which three (the last line's first three) are the attention itself.

    a_proj -> prepare_latents (norms, RoPE of the key, cache write) -> q_b_proj
           -> absorb_queries (with RoPE) -> attend_latents -> expand_values -> o_proj

In FP8 they are as many: each of the three dense products reads rows that the launch before it has quantised. Only
kv_b_proj is multiplied out when it is loaded, as its halves are multiplied with float32 sums of their own.
"""

from functools import lru_cache, partial
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from crossdock.backend import Backend, resolve_backend
from crossdock.gemm import BLOCK, QuantSpec, Rows
from crossdock.linear import ROW_QUANTUM, linear
from crossdock.models.blocks import Linear, RMSNorm, make_linear, quant_of, rotate_halves, rotate_interleaved
from crossdock.models.cache import Batch, PagedCache, Span
from crossdock.models.deepseek.absorbed_kernel import absorb_queries_triton
from crossdock.models.deepseek.config import DeepSeekConfig
from crossdock.models.deepseek.latent_attention_kernel import attend_latents_triton
from crossdock.models.deepseek.mla_kernel import prepare_latents_triton
from crossdock.models.deepseek.values_kernel import can_quantize_values, expand_values_triton

LATENT_NORM_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps is


class MLA(nn.Module):
    """Names of the projections are the checkpoint's; `layer` is this layer's place in the cache.

    Training goes through torch operations on every backend: with a cache, nothing has a gradient.
    """

    def __init__(
        self,
        config: DeepSeekConfig,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.in_kernels = resolve_backend(backend, device) == "triton"
        self.heads, self.nope, self.rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        self.scale = (self.nope + self.rope) ** -0.5
        if config.rope.mscale_all_dim:
            self.scale *= config.rope.magnitude(config.rope.mscale_all_dim) ** 2
        self.interleaved = config.rope_interleave
        self.rotate = rotate_interleaved if self.interleaved else rotate_halves
        size_D, bias = config.hidden_size, config.attention_bias
        query_size = self.heads * (self.nope + self.rope)
        self.query_rank = config.q_lora_rank or query_size
        as_asked = partial(make_linear, dtype=dtype, device=device, backend=backend)
        # q_a_proj (or q_proj, where queries are not compressed) above kv_a_proj_with_mqa, if no block spans both
        of_rows = config.dense if self.query_rank % BLOCK == 0 else QuantSpec()
        self.a_proj = as_asked(size_D, self.query_rank + self.latent + self.rope, of_rows, bias=bias)
        self.q_a_layernorm = self.q_b_proj = None
        if config.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype, device)
            self.q_b_proj = as_asked(config.q_lora_rank, query_size, config.dense)
        self.kv_a_layernorm = RMSNorm(self.latent, LATENT_NORM_EPS, dtype, device)
        self.kv_b_proj = Linear(self.latent, self.heads * (self.nope + self.value), dtype, device, is_read=True)
        self.o_proj = as_asked(self.heads * self.value, size_D, config.dense, bias=bias)

    def forward(self, x: Rows, rope: tuple[Tensor, Tensor], batch: Batch, cache: PagedCache | None) -> Tensor:
        """[T, D] -> [T, D]. Writes this step's latents to `cache`; without one, spans are whole sequences."""
        a_TX = self.a_proj(x)
        if cache is not None and self.in_kernels:
            return self._in_kernels(a_TX, rope, batch, cache)
        q_TQ, kv_TC = torch.split(a_TX, [self.query_rank, self.latent + self.rope], dim=-1)
        if self.q_a_layernorm is not None and self.q_b_proj is not None:
            q_TQ = self.q_b_proj(self.q_a_layernorm(q_TQ))
        q_THQ = q_TQ.view(len(a_TX), self.heads, self.nope + self.rope)
        rotary = torch.cat((q_THQ[..., self.nope :], kv_TC[:, None, self.latent :]), dim=1)
        rotary = self.rotate(rotary, rope)  # H queries and the one key
        q_THQ = torch.cat((q_THQ[..., : self.nope], rotary[:, :-1]), dim=-1)
        latent_TC = torch.cat((self.kv_a_layernorm(kv_TC[:, : self.latent]), rotary[:, -1]), dim=-1)
        if cache is None:
            y_TD: Tensor = self.o_proj(self._whole(q_THQ, latent_TC, len(batch.spans)))
            return y_TD
        cache.write(self.layer, batch.rows_T, latent_TC)
        out = []
        for span in batch.spans:
            q, latent_JC = q_THQ[span.start : span.stop], cache.read(self.layer, span.rows)
            out.append(self._decode(q, latent_JC, span, cache) if span.decode else self._plain(q, latent_JC, span))
        y_TD = self.o_proj(torch.cat(out) if out else a_TX.new_empty(0, self.heads * self.value))
        return y_TD

    def _in_kernels(self, a_TX: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, cache: PagedCache) -> Tensor:
        """What follows `a_proj`, by kernels: prompts one by one, all decoded tokens together."""
        rows, w_XC = cache.data[self.layer], self.kv_b_proj.weight
        q_weight = None if self.q_a_layernorm is None else self.q_a_layernorm.weight
        of_step = rope, batch.rows_T, rows, LATENT_NORM_EPS, self.interleaved, quant_of(self.q_b_proj)
        q = prepare_latents_triton(a_TX, q_weight, self.kv_a_layernorm.weight, *of_step)
        q_TQ = q if self.q_b_proj is None else self.q_b_proj(q)
        assert isinstance(q_TQ, Tensor), "codes are for q_b_proj alone"
        decoding, shape = batch.decoding, (len(a_TX), self.heads * self.value)
        quant = quant_of(self.o_proj) if can_quantize_values(self.value) else None
        if quant is None or decoding is None or len(decoding.tokens_N) < len(a_TX):  # o_proj will quantise for itself
            out_TX, scale_TB = a_TX.new_empty(shape), None
        else:
            out_TX = torch.empty(shape, dtype=torch.float8_e4m3fn, device=a_TX.device)
            scale_TB = torch.empty(len(a_TX), self.heads, dtype=torch.float32, device=a_TX.device)
        for span in batch.spans:
            if not span.decode:
                of_span = slice(span.start, span.stop)
                q_THQ = q_TQ[of_span].view(-1, self.heads, self.nope + self.rope)
                rotary = self.rotate(q_THQ[..., self.nope :], (rope[0][of_span], rope[1][of_span]))
                q_THQ = torch.cat((q_THQ[..., : self.nope], rotary), dim=-1)
                out_TX[of_span] = self._plain(q_THQ, cache.read(self.layer, span.rows), span)
        if decoding is not None:
            q_NHX = absorb_queries_triton(q_TQ, w_XC, rope, decoding, self.heads, self.interleaved)
            mean_WHC, lse_WH = attend_latents_triton(q_NHX, rows, decoding, self.latent, self.scale)
            scaled = () if scale_TB is None else (scale_TB, quant)
            expand_values_triton(mean_WHC, lse_WH, w_XC, decoding, self.nope, out_TX, *scaled)
        y_TD: Tensor = self.o_proj(out_TX if scale_TB is None else (out_TX, scale_TB))
        return y_TD

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
        q, k, v = (rearrange(t, "(s j) h q -> s h j q", s=sequences) for t in (q_THQ, k_THQ, v_THV))
        y_TX: Tensor = rearrange(self._attend(q, k, v, None), "s h j v -> (s j) (h v)")
        return y_TX

    def _plain(self, q_THQ: Tensor, latent_JC: Tensor, span: Span) -> Tensor:
        """Tokens of a prompt, [T, H * V]."""
        q = q_THQ.transpose(0, 1)[None]
        k, v = (t.transpose(0, 1)[None] for t in self._expand(latent_JC[: span.context]))
        tokens, mask = len(q_THQ), None
        if tokens != span.context:
            mask = torch.ones(tokens, span.context, dtype=torch.bool, device=q.device).tril(span.context - tokens)
        return self._attend(q, k, v, mask)[0].transpose(0, 1).reshape(tokens, self.heads * self.value)

    def _decode(self, q_THQ: Tensor, latent_JC: Tensor, span: Span, cache: PagedCache) -> Tensor:
        """Tokens that continue a sequence, [T, H * V]; those whose contexts end in the same page go together."""
        w_HNC, w_HCV = self._weights_to_absorb(cache)
        latent_JC = latent_JC.to(w_HNC.dtype)
        q_THQ = q_THQ.to(w_HNC.dtype) * self.scale
        ends = range(span.context - len(q_THQ) + 1, span.context + 1)
        out, start = [], 0
        for pages, group in groupby(ends, lambda end: -(-end // cache.page_size)):
            count = len(list(group))
            q, rows_JC = q_THQ[start : start + count], latent_JC[: pages * cache.page_size]
            out.append(self._over_pages(q, ends[start], rows_JC, w_HNC, w_HCV))
            start += count
        return torch.cat(out).to(self.kv_b_proj.weight.dtype)

    def _over_pages(self, q_THQ: Tensor, end: int, latent_JC: Tensor, w_HNC: Tensor, w_HCV: Tensor) -> Tensor:
        """Query t over the first `end` + t rows, [T, H * V]. J is whole pages, and the products of each head have whole
        quanta of rows, so that a token meets products of the same shape whether it is alone or one of several."""
        tokens = len(q_THQ)
        q_HTQ = q_THQ.transpose(0, 1)
        absorbed_HTC = torch.bmm(_whole_quanta(q_HTQ[..., : self.nope]), w_HNC)[:, :tokens]
        absorbed_HTC = torch.cat((absorbed_HTC, q_HTQ[..., self.nope :]), dim=-1)
        scores_HTJ = linear(absorbed_HTC.flatten(0, 1), latent_JC).view(self.heads, tokens, -1)
        scores_HTJ = scores_HTJ.masked_fill(_behind(end, tokens, len(latent_JC), latent_JC.device), float("-inf"))
        probs_XJ = scores_HTJ.softmax(-1, dtype=torch.float32).flatten(0, 1).to(latent_JC.dtype)
        mean_HTC = linear(probs_XJ, latent_JC[:, : self.latent].T).view(self.heads, tokens, self.latent)
        return torch.bmm(_whole_quanta(mean_HTC), w_HCV)[:, :tokens].transpose(0, 1).flatten(1)

    def _weights_to_absorb(self, cache: PagedCache) -> tuple[Tensor, Tensor]:
        """W_UK [H, N, C] and W_UV transposed, [H, C, V]; on a CPU in float32, converted once a cache."""
        if self.layer not in cache.derived:
            w_HXC = self.kv_b_proj.weight.detach().view(self.heads, self.nope + self.value, self.latent)
            w_HXC = w_HXC.float() if w_HXC.device.type == "cpu" else w_HXC
            cache.derived[self.layer] = w_HXC[:, : self.nope], w_HXC[:, self.nope :].transpose(1, 2)
        return cache.derived[self.layer]


@lru_cache(maxsize=8)  # all layers of a step ask for the same
def _behind(end: int, tokens: int, rows: int, device: torch.device) -> Tensor:
    """Whether cache row j stands behind the first `end` + t, bool [T, J]."""
    first_T1 = torch.arange(end, end + tokens, device=device)[:, None]
    return torch.arange(rows, device=device) >= first_T1


def _whole_quanta(x_HTC: Tensor) -> Tensor:
    """Zero rows behind each head's, up to a multiple of ROW_QUANTUM."""
    return F.pad(x_HTC, (0, 0, 0, -x_HTC.shape[1] % ROW_QUANTUM))
