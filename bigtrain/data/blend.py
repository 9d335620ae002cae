"""Which source is sample g of the run read from, and which of its samples is it: integer quotas in shuffled blocks.

In every block of `sum(quotas)` samples a source has exactly its quota, in an order of the block's own. A stage begins
at a sample and has quotas of its own; what comes before it does not depend on it, so a stage may be added while a run
goes on. There are no index arrays: any sample is placed in constant time and memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from bigtrain.data.order import Ints, Permutation, key

BLOCK = 8192
"""Samples in a block: weights are kept to 1/8192, after every 8192 samples exactly."""
LARGEST_BLOCK = 2**20
"""For weights that would have no sample in a smaller block."""


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in one block, by the method of the largest remainder.

    The block is the smallest power of two, from BLOCK on, that gives every weight above 0 a sample. ValueError if
    that is more than LARGEST_BLOCK, or no weight is above 0.
    """
    total = sum(map(Fraction, weights))
    if total <= 0 or min(weights) < 0:
        raise ValueError("one weight at least must be above 0, and none below")
    block = BLOCK
    while block <= LARGEST_BLOCK:
        shares = [Fraction(weight) * block / total for weight in weights]
        found = [int(share) for share in shares]
        by_remainder = sorted(range(len(found)), key=lambda i: (found[i] - shares[i], i))
        for i in by_remainder[: block - sum(found)]:
            found[i] += 1
        if all(n > 0 or weight == 0 for n, weight in zip(found, weights, strict=True)):
            return tuple(found)
        block *= 2
    raise ValueError(f"weights differ by more than a factor of {LARGEST_BLOCK:,}")


@dataclass(frozen=True)
class Stage:
    """From sample `start` on, until the next stage."""

    start: int
    quotas: tuple[int, ...]
    """Samples of each source in one block."""

    @property
    def block(self) -> int:
        """Samples in a block."""
        return sum(self.quotas)

    def shuffled(self, number: int, seed: int) -> tuple[Ints, Ints]:
        """Of one block: the source of each sample, and how many of that source came before it; both int64 (block,)."""
        if max(self.quotas) == self.block:  # of one source
            return np.full(self.block, np.argmax(self.quotas)), np.arange(self.block)
        # By the stage's start, not by its number: a stage that is put in later leaves the others as they are.
        order = Permutation(self.block, key(seed, 3, self.start, number)).array(np.arange(self.block))
        sources = np.searchsorted(np.cumsum(self.quotas), order, "right")
        before = np.empty(self.block, np.int64)
        before[np.argsort(sources, kind="stable")] = np.concatenate([np.arange(n) for n in self.quotas])
        return sources, before

    def counts(self, samples: int, seed: int) -> Ints:
        """How many of the stage's first `samples` come from each source, int64 (sources,)."""
        blocks, rest = divmod(samples, self.block)
        found = blocks * np.array(self.quotas, np.int64)
        if rest:
            found += np.bincount(self.shuffled(blocks, seed)[0][:rest], minlength=len(found))
        return found

    def end_of(self, source: int, count: int, seed: int) -> int:
        """The sample behind the stage's `count`-th (from 1) of a source."""
        block, inside = divmod(count - 1, self.quotas[source])
        sources, before = self.shuffled(block, seed)
        return self.start + block * self.block + int(np.argmax((sources == source) & (before == inside))) + 1


class Blend:
    """Sample g -> (source, how many samples of that source came before it)."""

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        """Stages in the order of their starts, the first at 0; all have quotas of the same sources."""
        assert stages[0].start == 0
        assert all(a.start < b.start for a, b in pairwise(stages))
        self.stages = tuple(stages)
        self._seed = seed
        self._starts = [stage.start for stage in stages]
        self._newest: tuple[tuple[int, int], tuple[Ints, Ints]] | None = None
        self._before = [np.zeros(len(stages[0].quotas), np.int64)]
        for a, b in pairwise(stages):
            self._before.append(self._before[-1] + a.counts(b.start - a.start, seed))

    def stage_of(self, sample: int) -> int:
        """Number of the stage that a sample lies in."""
        return bisect_right(self._starts, sample) - 1

    def place(self, sample: int) -> tuple[int, int]:
        """Source and ordinal of sample g >= 0."""
        number = self.stage_of(sample)
        stage = self.stages[number]
        block, inside = divmod(sample - stage.start, stage.block)
        sources, before = self._block(number, block)
        source = int(sources[inside])
        earlier = int(self._before[number][source])
        return source, earlier + block * stage.quotas[source] + int(before[inside])

    def consumed(self, samples: int) -> Ints:
        """How many of the first `samples` samples come from each source, int64 (sources,)."""
        number = self.stage_of(max(samples - 1, 0))
        return self._before[number] + self.stages[number].counts(samples - self._starts[number], self._seed)

    def before(self, number: int) -> Ints:
        """How many samples of each source come before a stage, int64 (sources,)."""
        return self._before[number]

    def _block(self, number: int, block: int) -> tuple[Ints, Ints]:
        newest = self._newest  # read once: another thread may put in its own
        if newest is None or newest[0] != (number, block):
            newest = (number, block), self.stages[number].shuffled(block, self._seed)
            self._newest = newest
        return newest[1]


def within_limits(
    stages: Sequence[tuple[int, Sequence[float], Sequence[float | None]]], seed: int
) -> tuple[list[Stage], int | None]:
    """Stages in which a source that has reached its limit gives its share to the others, in their proportions.

    Each given stage is (start, weights, samples that each source may give in all, if it is read as in this stage
    from its beginning; None: any number). Also returned is the sample before which the last source ends (None: one
    goes on for ever). ValueError: see `quotas`.
    """
    found: list[Stage] = []
    used = [Fraction(0)] * len(stages[0][1])  # share of its limit that each source has given
    for (start, given, limits), after in zip(stages, [*(s[0] for s in stages[1:]), None], strict=True):
        weights = list(given)
        while after is None or start < after:
            left = [
                None if limit is None else int((1 - share) * Fraction(limit))
                for limit, share in zip(limits, used, strict=True)
            ]
            weights = [0.0 if n == 0 else weight for n, weight in zip(left, weights, strict=True)]
            if not any(weights):
                return found, start
            stage = Stage(start, quotas(weights))
            ends = [stage.end_of(i, n, seed) for i, n in enumerate(left) if n is not None and stage.quotas[i]]
            until = min([*ends, *([after] if after is not None else [])], default=None)
            found.append(stage)
            if until is None:
                return found, None
            counts = stage.counts(until - start, seed)
            used = [
                share + Fraction(int(n)) / Fraction(limit) if limit else share
                for share, limit, n in zip(used, limits, counts, strict=True)
            ]
            start = until
    return found, None
