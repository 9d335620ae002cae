"""The planner's memory formulas in fp32, for a transformer with gated mlp and as many kv heads as heads.

Notation: P elements of this rank's weights, T tokens of a microbatch, h width, f feed-forward width, t, c, d, p ranks
of tensor, context, data, pipeline. 4 bytes an element: weights 4, gradients 4, AdamW 8, and 4 for the fp32 partition
that DeepSpeed keeps beside weights that are fp32 already.
"""

from __future__ import annotations

from typing import Any

from bigtrain.model.loss import CHUNK_CPU, CHUNK_TOKENS

E = 4


def predicted(case: dict[str, Any], rank: int) -> tuple[float, float]:
    """Bytes after a step, and at most in it, of one pipeline rank (the ranks of other axes are alike)."""
    model, layout = case["model"], case["layout"]
    t, c, p = (layout.get(axis, 1) for axis in ("tensor", "context", "pipeline"))
    d = case["world"] // (t * p * c)
    stage = rank * p // case["world"]
    layers = model["layers"] / p
    h, f, V = model["width"], model["ffn_width"], model["vocab_size"]
    first, last = stage == 0, stage == p - 1
    matrices = layers * (4 * h * h + 3 * h * f) + (first + last) * V * h
    P = matrices / t + (2 * layers + last) * h
    static, extra, copies = states(P, (4 * h * h + 3 * h * f) / t, layout["zero"], d * c)
    return static, static + extra + max(activations(case, stage), copies)


def states(P: float, block: float, zero: int, n: int) -> tuple[float, float, float]:
    """Bytes that stay; gradients, buckets and gathered weights on top; copies while gradients travel.

    Of P elements, of which a layer has `block`, on n replicas. The copies grow as activations go, so the larger of the
    two counts. A bucket has 25 MB (zero 0: several in flight) or an eighth of the model (DeepSpeed, up to 400 MB). At
    zero 2 the copies are at most the weights: a gradient larger than the bucket travels alone, beside a flattened copy.
    """
    weights = P * E
    if zero == 0:
        return 3 * weights, weights, weights if n > 1 else 0.0
    if zero == 1:
        return weights + 3 * weights / n, weights + weights / 8, 0.0
    if zero == 2:
        return weights + 3 * weights / n, weights / n + weights / 8, weights
    # DeepSpeed keeps the partition of the gradients and the bucket from step to step. Gathered weights: a quarter of
    # them, two layers at least, and an eighth or a layer that is read ahead beside the pieces it is put together from.
    # A bucket is copied for its reduce-scatter, and one more fills meanwhile.
    gathered = max(weights / 4, 2 * block * E) + max(weights / 8, block * E)
    return 5 * weights / n + weights / 8, gathered, 3 * weights / 8


def activations(case: dict[str, Any], stage: int) -> float:
    """Bytes kept for the backward passes in flight, and what the last forward or the first backward adds."""
    model, layout = case["model"], case["layout"]
    t, c, p = (layout.get(axis, 1) for axis in ("tensor", "context", "pipeline"))
    h, f, V = model["width"], model["ffn_width"], model["vocab_size"]
    T = case["batch"] * case["sequence"] / c
    shared = t if layout.get("sequence", True) else 1
    # Inputs of two norms and what a CPU's RMSNorm keeps (its normalised input) are shared token by token; the norms'
    # outputs are kept as they entered the region, whole. Keys and values are those of all context ranks.
    layer = T * E * (4 * h / shared + 2 * h + (2 + 2 * c) * h / t + 4 * f / t)
    held = layer * model["layers"] / p
    top = 4 * f / t * T * E  # gradients inside the mlp whose backward runs
    if layout.get("recompute") == "full":
        held, top = T * E * h / shared * model["layers"] / p, top + layer
    if stage == p - 1:
        chunk = min(T, max(CHUNK_TOKENS, CHUNK_CPU // (V // t)))
        loss = T * E * 2 * h + V * h / t * E + 2 * chunk * V / t * E + T * E * 2 * h / shared
        top = max(top, loss)
    return held * min(case["microbatches"], p - stage) + top
