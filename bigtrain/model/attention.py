"""Who sees whom, and the attention of one layer.

Shapes: B batch, S sequence, T = B x S packed tokens, L keys (S, or what a cache holds), H query heads, K
key/value heads, D head dim, C model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils.checkpoint import checkpoint

from bigtrain.config import ModelConfig
from bigtrain.model.cache import KVCache
from bigtrain.model.norm import RMSNorm
from bigtrain.model.rope import rope_tables, rotate


@dataclass(frozen=True)
class Scope:
    """What all layers of one forward pass share; computed once, not once a layer."""

    rows: tuple[int, int]
    """(B, S) of the queries."""
    positions: torch.Tensor
    """(S,) or (B, S) int64: the place of each token in its own document."""
    rope: tuple[torch.Tensor, torch.Tensor] | None
    """cos and sin for these positions, or None with learned positions."""
    mask: torch.Tensor | None
    """(1 or B, 1, S, L) bool, True where a query (S) sees a key (L). None: what follows says it all."""
    causal: bool
    """Without a mask: each token sees itself and those before it. False: it sees every token."""
    fused: bool = False
    """Attention is the fused kernels', which need no mask: they know documents and windows themselves."""
    cu_seqlens: torch.Tensor | None = None
    """Only when `fused`: (documents + 1,) int32, the documents in the B S tokens, every row's end being one's too."""
    window: int = 0
    """Only when `fused`: a token sees this many, itself included. 0: all."""


def make_scope(
    config: ModelConfig,
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    cache: KVCache | None = None,
    *,
    explicit: bool = False,
    fused: bool = False,
    queries: torch.Tensor | None = None,
) -> Scope:
    """Positions, rotary tables and visibility of tokens (B, S).

    `explicit` asks for a mask even where "causal" would do (the reference attention). `fused` asks for none where
    the fused kernels can do without: with a cache, or with some of the columns, there may be one. `queries` (S,) int64
    are the columns this rank computes, by default all; then S below counts these, and keys are all columns.
    """
    B, S = tokens.shape
    causal = config.objective == "causal"
    positions = torch.arange(S, device=tokens.device)
    keys = positions
    document: torch.Tensor | None = None
    if cache is not None:
        positions = cache.lengths[:, None] + positions
        keys = torch.arange(cache.end + S, device=tokens.device)
    elif cu_seqlens is not None and len(cu_seqlens) != B + 1:  # B + 1: rows are the only boundaries
        document, positions = documents(cu_seqlens, B, S)
    if queries is not None:
        positions = positions[..., queries]
    rope = rope_tables(positions, config) if config.position == "rope" else None
    if fused and cache is None and queries is None:
        ends = None if document is None or cu_seqlens is None else _ends(cu_seqlens, B, S)
        return Scope((B, S), positions, rope, None, causal, True, ends, config.sliding_window or 0)
    same: torch.Tensor | None = None
    if document is not None:
        asking = document if queries is None else document[:, queries]
        same = asking[:, :, None] == document[:, None, :]
    mask: torch.Tensor | None = same
    if causal and (explicit or same is not None or cache is not None or config.sliding_window):
        # Distances between tokens of one document are the same in the row's numbering.
        row = positions if cache is not None else keys if queries is None else queries
        back = row[..., :, None] - keys
        near = back >= 0
        if config.sliding_window:
            near &= back < config.sliding_window
        mask = near if same is None else near & same
    if mask is not None:
        mask = mask[:, None] if mask.dim() == 3 else mask[None, None]
    return Scope((B, positions.shape[-1]), positions, rope, mask, causal, fused)


def _ends(cu_seqlens: torch.Tensor, B: int, S: int) -> torch.Tensor:
    """The ends of documents and of rows; one that is both comes twice, with an empty document between."""
    rows = torch.arange(B + 1, dtype=torch.int32, device=cu_seqlens.device) * S
    return torch.cat([cu_seqlens.to(torch.int32), rows]).sort().values


def documents(cu_seqlens: torch.Tensor, B: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The document number and the position in it of each packed token; both (B, S) int64."""
    token = torch.arange(B * S, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    document = torch.searchsorted(starts[1:], token, right=True)
    return document.view(B, S), (token - starts[document]).view(B, S)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scope], torch.Tensor]
Project = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def attend_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scope: Scope) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, spelt out: q (B, S, H, D), k and v (B, L, K, D) -> (B, S, H, D)."""
    q, k, v = q.transpose(1, 2), _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if scope.mask is not None:
        scores = scores.masked_fill(~scope.mask, float("-inf"))
    out: torch.Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
    return out.transpose(1, 2)


def attend_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scope: Scope) -> torch.Tensor:
    """The same through torch's fused attention, which never holds the S x L scores."""
    grouped = k.shape[2] != q.shape[2]
    # enable_gqa saves the copies, but only CUDA's flash kernel is fast with it, and that one takes no mask.
    native = grouped and q.is_cuda and scope.mask is None
    if grouped and not native:
        k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    else:
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    causal = scope.causal and scope.mask is None
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=scope.mask, is_causal=causal, enable_gqa=native
    )
    return out.transpose(1, 2)


def attend_fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scope: Scope) -> torch.Tensor:
    """The same by our Triton kernels: no mask, no score, no repeated key; documents and windows cost what they hold.

    What comes with a mask of its own, a cache's for instance, goes to torch.
    """
    lower = isinstance(scope.mask, CausalBias) and scope.mask.variant == CausalVariant.LOWER_RIGHT
    if not scope.fused or (scope.mask is not None and not lower):
        return attend_sdpa(q, k, v, scope)
    from bigtrain_kernels.attention_api import flash_attn_func, flash_attn_varlen_func  # loads triton

    seen = (scope.window - 1 if scope.window else -1, -1)
    out: torch.Tensor
    if scope.cu_seqlens is None or lower:
        out = flash_attn_func(q, k, v, causal=scope.causal, window_size=seen)
        return out
    q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
    ends = scope.cu_seqlens
    out = flash_attn_varlen_func(q_, k_, v_, ends, ends, causal=scope.causal, window_size=seen)
    return out.view(q.shape)


def _repeat_heads(x: torch.Tensor, H: int) -> torch.Tensor:
    """(B, L, K, D) -> (B, H, L, D): key/value head j serves the query heads j H/K .. (j + 1) H/K - 1."""
    B, L, K, D = x.shape
    x = x.transpose(1, 2)
    return x if K == H else x[:, :, None].expand(B, K, H // K, L, D).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, rotary positions and optional qk-norm."""

    def __init__(self, config: ModelConfig, layer: int, *, kernels: str, recompute: str) -> None:
        super().__init__()
        C, H, K, D = config.width, config.num_heads, config.num_kv_heads, config.dim_per_head
        qkv_bias = config.bias or config.qkv_bias
        self.layer = layer
        self.head_dim = D
        self.recompute = recompute == "selective"
        self.attend: Attend = attend_reference if kernels == "reference" else attend_fused
        self.q_proj = nn.Linear(C, H * D, bias=qkv_bias)
        self.k_proj = nn.Linear(C, K * D, bias=qkv_bias)
        self.v_proj = nn.Linear(C, K * D, bias=qkv_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.bias)
        # One call for all three, so that parallel.tensor can put one module in its place.
        self.project: Project = self._project
        self.kernels = kernels
        self.q_norm = RMSNorm(D, config.norm_eps, kernels) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.norm_eps, kernels) if config.qk_norm else None

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: torch.Tensor, scope: Scope, cache: KVCache | None = None) -> torch.Tensor:
        """(B, S, C) -> (B, S, C). With a cache, keys and values are stored there and read back from it."""
        # -1: the heads this module holds, which is a part of them under tensor parallelism.
        q, k, v = (part.view(*scope.rows, -1, self.head_dim) for part in self.project(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if scope.rope is not None:
            q, k = (rotate(x, *scope.rope, self.kernels) for x in (q, k))
        if cache is not None:
            k, v = cache.append(self.layer, k, v, scope.positions)
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self.attend, q, k, v, scope, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.attend(q, k, v, scope)
        projected: torch.Tensor = self.o_proj(out.flatten(2))
        return projected
