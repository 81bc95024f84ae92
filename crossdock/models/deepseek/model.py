"""The DeepSeek-V3 family: MLA, dense first layers, MoE layers, and a multi-token-prediction (MTP) layer.

Between layers the hidden states travel as two addends, what a block gave and what stood before it, so that the sum and
the norm that follows it are one launch on a GPU. A norm is always what comes next, be it the next layer's or the last.
Where the block behind it multiplies in FP8, the norm gives the codes too. A decoder layer that decodes is then twelve
launches outside attention's core, six of them an MoE layer whose shared expert is a group of the routed ones.

Legend: T tokens on this rank, D hidden, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossdock.backend import Backend, resolve_backend
from crossdock.comm.transport import Transport
from crossdock.gemm import Codes, QuantSpec, Rows, rms_norm, rms_norm_quantize
from crossdock.models.blocks import Linear, RMSNorm, Rotary, quant_of
from crossdock.models.cache import Batch, PagedCache, in_batches
from crossdock.models.deepseek.config import DeepSeekConfig
from crossdock.models.deepseek.mla import MLA
from crossdock.moe import ExchangeConfig, MoELayer, SwigluMLP
from crossdock.moe.config import FLAT
from crossdock.moe.mlp import Fp8MLP, make_mlp
from crossdock.moe.two_batch import Steps, run


class Normed(NamedTuple):
    """What a block begins with: rows behind the norm, their codes where it multiplies in FP8, and what was normalised.

    `rows_TD` is None where a block needs the codes alone.
    """

    rows_TD: Tensor | None
    codes: Codes | None
    sum_TD: Tensor

    @property
    def input(self) -> Rows:
        """For a block that reads one of the two."""
        found = self.rows_TD if self.codes is None else self.codes
        assert found is not None
        return found


class BlockNorm(RMSNorm):
    """The norm of h = x + residual, or of x where there is no residual yet, in one launch on the triton backend.

    quant      what the block behind it multiplies in FP8, None for nothing
    with_rows  that block reads the rows as they are, too
    """

    def __init__(
        self,
        size: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        quant: QuantSpec | None = None,
        with_rows: bool = False,
    ) -> None:
        super().__init__(size, eps, dtype, device)
        self.in_kernels = resolve_backend(backend, device) == "triton"
        self.quant, self.with_rows = quant, with_rows

    def add(self, x_TD: Tensor, residual_TD: Tensor | None) -> Normed:
        """Two addends of the hidden states [T, D] -> what the block behind reads, and their sum."""
        if self.quant is not None:
            options = {"pow2": self.quant.pow2_scales, "with_rows": self.with_rows}
            backend: Backend = "triton" if self.in_kernels else "torch"
            out = rms_norm_quantize(x_TD, self.weight, self.eps, residual_TD, **options, backend=backend)
            return Normed(out.rows_TD, (out.q_TD, out.scale_TB), x_TD if out.residual_TD is None else out.residual_TD)
        if residual_TD is None:
            return Normed(self(x_TD), None, x_TD)
        if self.in_kernels:
            rows_TD, sum_TD = rms_norm(x_TD, self.weight, self.eps, residual_TD, backend="triton")
            return Normed(rows_TD, None, sum_TD)
        x_TD = residual_TD + x_TD
        return Normed(self(x_TD), None, x_TD)


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
        exchange: ExchangeConfig = FLAT,
    ) -> None:
        super().__init__()
        size_D = config.hidden_size
        norm = partial(BlockNorm, size_D, config.rms_norm_eps, dtype, device, backend)
        self.self_attn = MLA(config, layer, dtype, device, backend)
        self.input_layernorm = norm(quant_of(self.self_attn.a_proj))
        self.mlp: SwigluMLP | Fp8MLP | MoELayer
        if layer < config.first_k_dense_replace:
            self.mlp = make_mlp(size_D, config.intermediate_size, config.dense, dtype, device, backend)
            self.post_attention_layernorm = norm(config.dense if isinstance(self.mlp, Fp8MLP) else None)
        else:
            self.mlp = MoELayer(config.moe, transport, exchange=exchange, dtype=dtype, device=device, backend=backend)
            quant = config.moe.quant if config.moe.quant.kind == "fp8_block" else None
            self.post_attention_layernorm = norm(quant, with_rows=True)  # for the router

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        cache: PagedCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Two addends of the hidden states [T, D] (the second None before the first layer) -> two addends."""
        return run(self.stages(x_TD, residual_TD, rope, batch, cache))

    def stages(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        cache: PagedCache | None,
    ) -> Steps[tuple[Tensor, Tensor]]:
        """`forward`, pausing where `MoELayer.stages` does."""
        normed = self.input_layernorm.add(x_TD, residual_TD)
        x_TD = self.self_attn(normed.input, rope, batch, cache)
        normed = self.post_attention_layernorm.add(x_TD, normed.sum_TD)
        if isinstance(self.mlp, MoELayer):
            assert normed.rows_TD is not None
            y_TD = yield from self.mlp.stages(normed.rows_TD, normed.codes)
            return y_TD, normed.sum_TD
        return self.mlp(normed.input), normed.sum_TD


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
        exchange: ExchangeConfig = FLAT,
    ) -> None:
        super().__init__()
        size_D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(size_D, eps, dtype, device)
        self.hnorm = RMSNorm(size_D, eps, dtype, device)
        self.eh_proj = Linear(2 * size_D, size_D, dtype, device)
        self.block = DecoderLayer(config, layer, transport, dtype, device, backend, exchange)
        self.norm = BlockNorm(size_D, eps, dtype, device, backend)

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
        y_TD = self.norm.add(x_TD, residual_TD).rows_TD
        assert y_TD is not None
        return y_TD


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
        self.norm = BlockNorm(config.hidden_size, config.rms_norm_eps, dtype, device, backend)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, device)
        self.mtp: MTPLayer | None = None
        if config.num_nextn_predict_layers:
            self.mtp = MTPLayer(config, config.num_hidden_layers, transport, dtype, device, backend, exchange)

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
        return in_batches(self.stages, ids_T, batch, cache, self.two_batch)

    def stages(self, ids_T: Tensor, batch: Batch, cache: PagedCache | None) -> Steps[Tensor]:
        """`forward` of one batch, pausing where the layers do."""
        rope = self.rotary(batch.positions_T)
        x_TD, residual_TD = F.embedding(ids_T, self.embed_tokens), None
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            x_TD, residual_TD = yield from layer.stages(x_TD, residual_TD, rope, batch, cache)
        y_TD = self.norm.add(x_TD, residual_TD).rows_TD
        assert y_TD is not None
        return y_TD

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
