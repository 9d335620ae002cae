"""What operators hold and send within themselves: neither is seen from outside, and a planner has to add it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bigtrain_kernels import attention as attention  # registers its operators
from bigtrain_kernels import linear_cross_entropy, norm


def workspace(op: Any, args: Sequence[Any]) -> int:
    """Bytes that a call of one of this package's operators holds at most, besides its arguments and results.

    `op` is an overload packet, such as torch.ops.bigtrain.norm. What is left out is a few numbers a document.
    """
    formula = _WORKSPACE.get(op)
    return 0 if formula is None else formula(*args)


def gathers(op: Any, args: Sequence[Any]) -> list[int]:
    """Bytes of each all-gather that a call waits for, over the group that it names, in order: all ranks' parts."""
    if op is not torch.ops.bigtrain.linear_cross_entropy or not args[11]:
        return []
    hidden, vocabulary, group, budget = args[0], args[10], args[11], args[13]
    ranks = _size(group)
    return [16 * ranks * rows for rows in _chunks(hidden, vocabulary, ranks, budget)]


def _size(group: str) -> int:
    return dist.get_world_size(linear_cross_entropy.ranks_of(group)) if group else 1


def _chunks(hidden: Any, vocabulary: int, ranks: int, budget: int) -> list[int]:
    """Tokens of each chunk of the loss."""
    step = linear_cross_entropy.chunk_tokens(vocabulary, ranks, hidden.element_size(), budget)
    return [min(step, len(hidden) - start) for start in range(0, len(hidden), step)]


def _linear_cross_entropy(
    hidden: Any, weight: Any, bias: Any, targets: Any, token_weight: Any, *rest: Any
) -> int:
    """A chunk's logits, with an exchange the next one's too, and the 16-bit product that is added to the gradient."""
    *_, vocabulary, group, _, budget, gradients = rest
    ranks, (v, C), size = _size(group), weight.shape, hidden.element_size()
    chunks = _chunks(hidden, vocabulary, ranks, budget)
    if not chunks:
        return 0
    alive = chunks[:2] if ranks > 1 else chunks[:1]
    numbers = 4 * (4 + (4 * ranks if ranks > 1 else 0)) * sum(alive) + 4 * 8 * chunks[0]
    return v * size * sum(alive) + (v * C * size if gradients and size < 4 else 0) + numbers


def _attention_backward(grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *_: Any) -> int:
    """The log-sum-exp in other units."""
    return int(4 * lse.numel())


def _norm_backward(dy: Any, dsum: Any, x: Any, weight: Any, mean: Any, scale: Any, shift: bool) -> int:
    """Each program's part of the gradients of weight and bias, and their sums."""
    rows, C = x.shape
    return (1 + shift) * (norm.programs_of(rows, C) + 1) * C * scale.element_size()


_WORKSPACE: dict[Any, Callable[..., int]] = {
    torch.ops.bigtrain.linear_cross_entropy: _linear_cross_entropy,
    torch.ops.bigtrain.attention_backward: _attention_backward,
    torch.ops.bigtrain.norm_backward: _norm_backward,
}
