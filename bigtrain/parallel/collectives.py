"""Collectives on one axis of the mesh: thin, explicit, and nothing at all where the axis has one rank.

Shapes: n ranks on the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.mesh import Axis

# torch 2.13 renamed these; 2.11 has the former names only.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way: `wait` returns what it makes. Compute in between overlaps with it."""

    def __init__(self, result: torch.Tensor, work: dist.Work | None = None) -> None:
        self._result, self._work = result, work

    def wait(self) -> torch.Tensor:
        """The result, once it is there (on a GPU: the current stream waits, the host does not)."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


def begin_sum(x: torch.Tensor, axis: Axis) -> Pending:
    """Start summing x over the axis, in place."""
    if axis.size == 1:
        return Pending(x)
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, group=axis.group, async_op=True))


def begin_gather(x: torch.Tensor, axis: Axis) -> Pending:
    """Start gathering (R, ...) of every rank along the first dim: (n R, ...), in the order of the axis."""
    if axis.size == 1:
        return Pending(x)
    whole = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    return Pending(whole, _gather(whole, x.contiguous(), group=axis.group, async_op=True))


def begin_scatter_sum(x: torch.Tensor, axis: Axis) -> Pending:
    """Start summing x (n R, ...) over the axis; each rank keeps its R rows."""
    if axis.size == 1:
        return Pending(x)
    part = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    return Pending(part, _scatter(part, x.contiguous(), group=axis.group, async_op=True))


def exchange(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """x (n, ...): row i goes to rank i; the result's row i came from rank i."""
    if axis.size == 1:
        return x
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=axis.group)
    return received


def sum_together(tensors: Sequence[torch.Tensor], axis: Axis) -> None:
    """Sum many small tensors over the axis in place, in one collective."""
    if axis.size == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=axis.group)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])
