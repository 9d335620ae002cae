"""Parameters and floating-point operations of a model, from its config alone.

Convention: a multiply and an add are two operations; only matrix products count (projections, attention
scores and their weighted sum, the output head), not look-ups, norms, activations, softmax or the loss. The
backward pass costs twice the forward pass; recomputation is not counted. These are model FLOPs, as in MFU
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

Letters: C width, H heads, K kv heads, D head dim, F ffn width, V vocab, S sequence.
"""

from __future__ import annotations

from typing import NamedTuple

from bigtrain.config import ModelConfig


class Flops(NamedTuple):
    """Operations per token, averaged over the tokens of a sequence."""

    forward: float
    """Every query times every key: what a kernel without masking executes, and what Megatron-LM reports."""
    training: float
    """3 x forward."""
    forward_visible: float
    """Only the keys that a query sees: half of the square with causal attention, less with a window."""
    training_visible: float
    """3 x forward_visible. Document boundaries are not known here and would lower it further."""


def parameters(config: ModelConfig) -> int:
    """Numbers to learn, exactly as instantiated; a tied head counts once."""
    V, C = config.vocab_size, config.width
    if config.kind == "lstm":
        return V * C + non_embedding_parameters(config) + V * C + V
    positions = config.max_length * C if config.position == "learned" else 0
    head = 0 if config.tied else V * C
    return V * C + positions + non_embedding_parameters(config) + head


def non_embedding_parameters(config: ModelConfig) -> int:
    """The layers and the last norm, without embedding tables and head: the N of scaling laws."""
    C, L = config.width, config.layers
    if config.kind == "lstm":
        return L * (8 * C * C + 8 * C)
    H, K, D, F = config.num_heads, config.num_kv_heads, config.dim_per_head, config.ffn
    norm = C * (2 if config.norm == "layernorm" and config.bias else 1)
    mlp_up = 2 * F if config.activation == "swiglu" else F
    layer = _layer_matrices(config) + 2 * norm
    if config.bias or config.qkv_bias:
        layer += (H + 2 * K) * D
    if config.bias:
        layer += C + mlp_up + C
    if config.qk_norm:
        layer += 2 * D
    return L * layer + norm


def flops_per_token(config: ModelConfig, sequence_length: int) -> Flops:
    """Forward and training operations per token in sequences of `sequence_length` tokens."""
    S, L, V, C = sequence_length, config.layers, config.vocab_size, config.width
    if config.kind == "lstm":
        forward = 2.0 * (L * 8 * C * C + V * C)
        return Flops(forward, 3 * forward, forward, 3 * forward)
    products = 2.0 * L * _layer_matrices(config) + head_flops(config)
    per_key = L * _flops_per_key(config)
    full = products + per_key * S
    visible = products + per_key * visible_keys(config, S) / S
    return Flops(full, 3 * full, visible, 3 * visible)


def head_flops(config: ModelConfig) -> float:
    """Forward operations per token of the output projection."""
    return 2.0 * config.vocab_size * config.width


def layer_flops(config: ModelConfig, sequence_length: int) -> float:
    """Forward operations per token of one transformer block, counting the keys that a query sees."""
    seen = visible_keys(config, sequence_length) / sequence_length
    return 2.0 * _layer_matrices(config) + _flops_per_key(config) * seen


def _flops_per_key(config: ModelConfig) -> float:
    """A score and a weighted value: 2 D each, for every head."""
    return 4.0 * config.num_heads * config.dim_per_head


def visible_keys(config: ModelConfig, sequence_length: int) -> int:
    """Pairs (query, key) of one sequence in which the query sees the key."""
    S = sequence_length
    if config.objective == "masked":
        return S * S
    W = min(config.sliding_window or S, S)
    return W * (W + 1) // 2 + (S - W) * W


def _layer_matrices(config: ModelConfig) -> int:
    """Weights of one block's matrices; each is used once a token."""
    C, H, K, D = config.width, config.num_heads, config.num_kv_heads, config.dim_per_head
    attention = C * H * D + 2 * C * K * D + H * D * C
    return attention + (3 if config.activation == "swiglu" else 2) * C * config.ffn
