"""Logical tensors and boxes: what a number *is*, whatever rank and flat buffer it lies in.

A logical tensor is a parameter, or one of its optimizer states, under its Hugging Face-like name and full shape.
A box is a hyper-rectangle of it. Initialisation, checkpoints, norm counting and planning all read the one
`Logical` record that each parameter carries (design D2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Logical:
    """Which box of which logical tensor a local parameter holds, and what other ranks hold of it.

    The one record that initialisation, gradient sums, norm counting, checkpoints and planning read.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    """The box's sizes: the parameter's own shape, kept because ZeRO-3 leaves an empty local tensor."""
    counted: bool = True
    """Whether this rank counts the box in the gradient norm and saves it: the first of the tensor and pipeline
    ranks that hold it. (Ranks of the data and context axes all hold the same; engines see to those.)"""
    summed: str = ""
    """The mesh axis over which this rank's gradient is only a part and must be summed; "" when it is whole."""

    @staticmethod
    def whole(name: str, shape: Iterable[int]) -> Logical:
        """The record of a parameter that is not cut."""
        sizes = tuple(shape)
        return Logical(name, sizes, (0,) * len(sizes), sizes)


@dataclass(frozen=True)
class Piece:
    """A view of local memory that holds one box of a logical tensor.

    `kind` is "master" (the fp32 weight) or an optimizer state ("exp_avg", "exp_avg_sq", "momentum_buffer");
    `tensor` is a view shaped like the box: reading it saves, writing into it loads.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor


@dataclass(frozen=True)
class FlatBox:
    """A box that is contiguous in a row-major tensor: its place in the tensor and in the flat numbering."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


def mark_logical(model: torch.nn.Module) -> None:
    """Give every parameter of a whole (unsharded) model its record: the full box under its own name."""
    for name, parameter in model.named_parameters():
        parameter.logical = Logical.whole(name, parameter.shape)  # type: ignore[attr-defined]


def logical_of(parameter: torch.nn.Parameter) -> Logical:
    """The record of a parameter."""
    record = parameter.logical  # type: ignore[attr-defined]
    assert isinstance(record, Logical)
    return record


def boxes_of_flat_range(shape: tuple[int, ...], start: int, count: int) -> list[FlatBox]:
    """Cut elements [start, start + count) of a row-major tensor of `shape` into boxes, in flat order.

    A range of a 2-D tensor gives at most three: the tail of a row, whole rows, the head of a row.
    """
    if count <= 0:
        return []
    if len(shape) == 0:
        return [FlatBox((), (), 0)]
    if len(shape) == 1:
        return [FlatBox((start,), (count,), start)]
    inner = math.prod(shape[1:])
    first, skip = divmod(start, inner)
    boxes: list[FlatBox] = []
    row = first
    if skip:
        head = min(count, inner - skip)
        boxes += _inside_row(shape, row, skip, head)
        count -= head
        row += 1
    rows, rest = divmod(count, inner)
    if rows:
        boxes.append(FlatBox((row, *(0 for _ in shape[1:])), (rows, *shape[1:]), row * inner))
    boxes += _inside_row(shape, row + rows, 0, rest)
    return boxes


def _inside_row(shape: tuple[int, ...], row: int, start: int, count: int) -> list[FlatBox]:
    """Boxes of part of one row, with the row as leading index."""
    base = row * math.prod(shape[1:])
    return [
        FlatBox((row, *box.offset), (1, *box.sizes), base + box.start)
        for box in boxes_of_flat_range(shape[1:], start, count)
    ]
