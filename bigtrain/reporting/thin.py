"""A curve of a million steps in a few hundred points that lose no spike, made while the steps are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """One column, a point for every bucket that holds a finite value, in order of the steps."""

    x: Floats
    """Mean of the abscissa's column over the bucket."""
    mean: Floats
    low: Floats
    high: Floats
    bucket: Ints
    """Which bucket each point is; curves of one `Thinned` share them."""


class Thinned:
    """Columns of numbers over steps, in at most `most` buckets of equally many steps each.

    A bucket keeps the number of finite values, their sum, lowest and highest. When the steps outgrow the buckets,
    neighbours are merged and the width doubles, so memory never grows and reading is one pass.
    """

    def __init__(self, columns: Sequence[str], most: int = 512) -> None:
        """`most` must be even."""
        assert most % 2 == 0
        self.columns = tuple(columns)
        self.most = most
        self.width = 1
        """Steps in a bucket: bucket i holds steps i * width + 1 to (i + 1) * width, the first also step 0."""
        shape = (len(self.columns), most)
        self._count = np.zeros(shape, np.int64)
        self._sum = np.zeros(shape)
        self._low = np.full(shape, np.inf)
        self._high = np.full(shape, -np.inf)

    def extend(self, steps: Ints, values: Mapping[str, Floats]) -> None:
        """Add records: their steps and, under every column's name, as many numbers; those not finite are left out."""
        if not len(steps):
            return
        while (int(steps.max()) - 1) // self.width >= self.most:
            self._widen()
        buckets = np.maximum(steps - 1, 0) // self.width
        for i, name in enumerate(self.columns):
            finite = np.isfinite(values[name])
            at, numbers = buckets[finite], values[name][finite]
            np.add.at(self._count[i], at, 1)
            np.add.at(self._sum[i], at, numbers)
            np.minimum.at(self._low[i], at, numbers)
            np.maximum.at(self._high[i], at, numbers)

    def cut(self, step: int) -> None:
        """Forget what came after `step`, to the bucket: of the one that holds `step`, all goes unless it ends there."""
        first = step // self.width
        self._count[:, first:] = 0
        self._sum[:, first:] = 0
        self._low[:, first:] = np.inf
        self._high[:, first:] = -np.inf

    def curve(self, name: str, x: str = "step") -> Curve:
        """A column over another one; only buckets where both have values."""
        i, j = self.columns.index(name), self.columns.index(x)
        bucket = np.flatnonzero((self._count[i] > 0) & (self._count[j] > 0))
        mean = self._sum[i, bucket] / self._count[i, bucket]
        # A sum of equal floats over their number may leave [low, high] by a rounding.
        low, high = self._low[i, bucket], self._high[i, bucket]
        at = self._sum[j, bucket] / self._count[j, bucket]
        return Curve(at, np.clip(mean, low, high), low, high, bucket)

    def total(self, name: str) -> tuple[int, float]:
        """Number of finite values in a column and their sum."""
        i = self.columns.index(name)
        return int(self._count[i].sum()), float(self._sum[i].sum())

    def _widen(self) -> None:
        """Merge every two neighbours."""
        half = self.most // 2
        empty = ((self._count, 0), (self._sum, 0.0), (self._low, np.inf), (self._high, -np.inf))
        merges = (np.add, np.add, np.minimum, np.maximum)
        for (values, nothing), merge in zip(empty, merges, strict=True):
            values[:, :half] = merge(values[:, 0::2], values[:, 1::2])
            values[:, half:] = nothing
        self.width *= 2
