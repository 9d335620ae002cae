"""The transformer: a Llama-style decoder, with GPT-2's and BERT's choices as options.

`Transformer(config)(tokens)` on one CPU is the oracle that everything else in bigtrain is compared with.
Parameters have Hugging Face's names without the "model." prefix. Shapes: B batch, S sequence, C model width,
F ffn width, V vocab.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.errors import UserError
from bigtrain.model.attention import Attention, Project, Scope, make_scope
from bigtrain.model.cache import KVCache
from bigtrain.model.kernels import attention_in_triton, in_triton
from bigtrain.model.loss import Head, LossSum
from bigtrain.model.norm import LayerNorm, RMSNorm

SHARDING = {
    "embed_tokens": ("vocabulary", "out"),
    "q_proj": ("heads", "out"),
    "k_proj": ("kv_heads", "out"),
    "v_proj": ("kv_heads", "out"),
    "o_proj": ("heads", "in"),
    "gate_proj": ("features", "out"),
    "up_proj": ("features", "out"),
    "down_proj": ("features", "in"),
    "lm_head": ("vocabulary", "out"),
}
"""How tensor parallelism may cut each module: along what, and on which side of its matrix. What is not named here
is the same on all ranks."""


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.bias)
        self.project: Project = self._project  # parallel.tensor puts one module in its place

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) -> (B, S, C)."""
        gate, up = self.project(x)
        if in_triton(self.kernels, gate):
            from bigtrain_kernels.swiglu import swiglu  # loads triton

            product = swiglu(gate, up)
        else:
            product = F.silu(gate) * up
        out: torch.Tensor = self.down_proj(product)
        return out


class GeluMLP(nn.Module):
    """down(gelu(up(x))) with the tanh approximation (GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.bias)
        self.project: Project = self._project

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.up_proj(x),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) -> (B, S, C)."""
        (up,) = self.project(x)
        out: torch.Tensor = self.down_proj(F.gelu(up, approximate="tanh"))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, *, kernels: str, recompute: str) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, kernels)
        self.self_attn = Attention(config, layer, kernels=kernels, recompute=recompute)
        self.post_attention_layernorm = make_norm(config, kernels)
        self.mlp = SwiGLU(config, kernels) if config.activation == "swiglu" else GeluMLP(config)

    def forward(self, x: torch.Tensor, scope: Scope, cache: KVCache | None = None) -> torch.Tensor:
        """(B, S, C) -> (B, S, C)."""
        attended = self.self_attn(self.input_layernorm(x), scope, cache)
        normed, x = self.post_attention_layernorm(attended, residual=x)
        return x + self.mlp(normed)  # type: ignore[no-any-return]


def make_norm(config: ModelConfig, kernels: str) -> nn.Module:
    """The normalisation that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, config.norm_eps, kernels)
    return LayerNorm(config.width, config.norm_eps, bias=config.bias, kernels=kernels)


class Transformer(nn.Module):
    """Embedding, blocks, norm, head. Knows nothing of ranks; a pipeline's chunk is one with parts taken out."""

    embed_tokens: nn.Module | None
    embed_positions: nn.Module | None
    norm: nn.Module | None
    lm_head: nn.Module | None

    def __init__(
        self,
        config: ModelConfig,
        loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
        *,
        kernels: str = "auto",
        recompute: str = "none",
    ) -> None:
        """Weights are PyTorch's defaults until `bigtrain.model.init.initialise` fills them."""
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.recompute = recompute
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        learned = config.position == "learned"
        self.embed_positions = nn.Embedding(config.max_length, config.width) if learned else None
        self.layers = nn.ModuleList(
            Block(config, i, kernels=kernels, recompute=recompute) for i in range(config.layers)
        )
        self.norm = make_norm(config, kernels)
        self.lm_head = Head(config.width, config.vocab_size, loss, kernels=kernels)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding matrix if the config says so."""
        if self.config.tied and self.lm_head is not None and self.embed_tokens is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        scope: Scope | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor | LossSum:
        """Logits (B, S, V) in the model's dtype, or with `targets` (B, S) the summed loss.

        tokens (B, S) int64. cu_seqlens (documents + 1,) int32: starts of the packed documents in the
        flattened B x S tokens, rows being boundaries too; documents do not see each other and positions
        restart at each. cache: keys and values of what came before, extended by this call. sample_ids is not
        used here (lstm's dropout is). scope: what `make_scope` would return, when the caller knows better.
        A model without an embedding goes on from `hidden` (B, S, C); one without a head returns that.
        Raises UserError when S is longer than model.max_length.
        """
        S = tokens.shape[1]
        if self.config.max_length < S:
            raise UserError(
                f"a sequence of {S} tokens is longer than model.max_length {self.config.max_length}",
                do="shorten the sequences or raise model.max_length",
            )
        if scope is None:
            scope = self.scope(tokens, cu_seqlens, cache)
        x = self._embed(tokens, scope) if hidden is None else hidden
        for layer in self.layers:
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(layer, x, scope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, scope, cache)
        if cache is not None:
            cache.advance(S)
        if self.lm_head is None or self.norm is None:
            return x
        return self.lm_head(self.norm(x), targets)  # type: ignore[no-any-return]

    def scope(
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        cache: KVCache | None = None,
        *,
        queries: torch.Tensor | None = None,
    ) -> Scope:
        """Who sees whom in tokens (B, S), in the form that this model's attention takes: see `make_scope`."""
        dtype = next(self.parameters()).dtype
        fused = attention_in_triton(self.kernels, self.config.dim_per_head, dtype, tokens)
        reference = self.kernels == "reference"
        return make_scope(
            self.config, tokens, cu_seqlens, cache, explicit=reference, fused=fused, queries=queries
        )

    def _embed(self, tokens: torch.Tensor, scope: Scope) -> torch.Tensor:
        """(B, S) -> (B, S, C)."""
        assert self.embed_tokens is not None, "a model without an embedding is given hidden states"
        x: torch.Tensor = self.embed_tokens(tokens)
        return x if self.embed_positions is None else x + self.embed_positions(scope.positions)

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for `rows` sequences of at most `length` tokens."""
        weight = next(self.parameters())
        return KVCache(self.config, rows, length, weight.device, weight.dtype)
