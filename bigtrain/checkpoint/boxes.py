"""Geometry of boxes: where two overlap, and whether many cover a tensor exactly once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Index = tuple[int, ...]


class Box(NamedTuple):
    """A hyper-rectangle of a logical tensor: [offset, offset + sizes) in every dimension."""

    offset: Index
    sizes: Index

    @property
    def end(self) -> Index:
        """One past the last index of every dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.sizes, strict=True))

    @property
    def elements(self) -> int:
        """Number of elements; a 0-d box has one."""
        return math.prod(self.sizes)

    def within(self, outer: Index) -> tuple[slice, ...]:
        """Slices that select this box from a tensor whose first element lies at `outer`."""
        return tuple(slice(o - b, o - b + n) for o, n, b in zip(self.offset, self.sizes, outer, strict=True))


def intersection(a: Box, b: Box) -> Box | None:
    """The overlap of two boxes of one tensor; None when they share no element."""
    offset = tuple(map(max, a.offset, b.offset))
    sizes = tuple(e - o for e, o in zip(map(min, a.end, b.end), offset, strict=True))
    return Box(offset, sizes) if all(n > 0 for n in sizes) else None


def flat_hull(box: Box, outer: Box) -> tuple[int, int]:
    """First and one-past-last flat element of `box` in the row-major numbering of `outer`, which holds it."""
    strides = [math.prod(outer.sizes[i + 1 :]) for i in range(len(outer.sizes))]
    first = sum((o - b) * s for o, b, s in zip(box.offset, outer.offset, strides, strict=True))
    last = sum((e - 1 - b) * s for e, b, s in zip(box.end, outer.offset, strides, strict=True))
    return first, last + 1


def coverage_problem(shape: Index, boxes: Sequence[Box]) -> str:
    """What keeps `boxes` from covering every element of `shape` exactly once; "" when they do.

    Sweeps along the dimension with the most distinct starts, so that the thousands of flat slices of a big
    tensor are compared with their neighbours only.
    """
    for box in boxes:
        if len(box.sizes) != len(shape) or any(
            o < 0 or n < 0 or e > s for o, n, e, s in zip(box.offset, box.sizes, box.end, shape, strict=True)
        ):
            return f"the piece at {box.offset} of size {box.sizes} reaches outside {shape}"
    filled = [box for box in boxes if box.elements]
    axis = max(range(len(shape)), key=lambda d: len({b.offset[d] for b in filled}), default=None)
    ordered = filled if axis is None else sorted(filled, key=lambda b: b.offset[axis])
    active: list[Box] = []
    for box in ordered:
        if axis is not None:
            active = [other for other in active if other.end[axis] > box.offset[axis]]
        for other in active:
            if (both := intersection(box, other)) is not None:
                return f"{both.elements} elements at {both.offset} were written twice"
        active.append(box)
    missing = math.prod(shape) - sum(box.elements for box in filled)
    return f"{missing} of {math.prod(shape)} elements were written by no rank" if missing else ""
