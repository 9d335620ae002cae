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
from bigtrain.model.attention import Attention, Scope, make_scope
from bigtrain.model.cache import KVCache
from bigtrain.model.loss import Head, LossSum
from bigtrain.model.norm import RMSNorm


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) -> (B, S, C)."""
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class GeluMLP(nn.Module):
    """down(gelu(up(x))) with the tanh approximation (GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.width, config.ffn, bias=config.bias)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, C) -> (B, S, C)."""
        out: torch.Tensor = self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, *, kernels: str, recompute: str) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer, kernels=kernels, recompute=recompute)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = SwiGLU(config) if config.activation == "swiglu" else GeluMLP(config)

    def forward(self, x: torch.Tensor, scope: Scope, cache: KVCache | None = None) -> torch.Tensor:
        """(B, S, C) -> (B, S, C)."""
        x = x + self.self_attn(self.input_layernorm(x), scope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)


class Transformer(nn.Module):
    """Embedding, blocks, norm, head. Knows nothing of ranks."""

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
        self.norm = make_norm(config)
        self.lm_head = Head(config.width, config.vocab_size, loss, kernels=kernels)
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding matrix if the config says so; again after `to_empty`."""
        if self.config.tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor | LossSum:
        """Logits (B, S, V) in the model's dtype, or with `targets` (B, S) the summed loss.

        tokens (B, S) int64. cu_seqlens (documents + 1,) int32: starts of the packed documents in the
        flattened B x S tokens, rows being boundaries too; documents do not see each other and positions
        restart at each. cache: keys and values of what came before, extended by this call. sample_ids is not
        used here (lstm's dropout is). Raises UserError when S is longer than model.max_length.
        """
        S = tokens.shape[1]
        if self.config.max_length < S:
            raise UserError(
                f"a sequence of {S} tokens is longer than model.max_length {self.config.max_length}",
                do="shorten the sequences or raise model.max_length",
            )
        scope = make_scope(self.config, tokens, cu_seqlens, cache, explicit=self.kernels == "reference")
        x = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            x = x + self.embed_positions(scope.positions)
        for layer in self.layers:
            if self.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(layer, x, scope, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, scope, cache)
        if cache is not None:
            cache.advance(S)
        return self.lm_head(self.norm(x), targets)  # type: ignore[no-any-return]

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for `rows` sequences of at most `length` tokens."""
        weight = self.embed_tokens.weight
        return KVCache(self.config, rows, length, weight.device, weight.dtype)
