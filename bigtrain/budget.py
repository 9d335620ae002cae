"""How many steps, how many sequences in each: pure functions of the config and of where the run stands.

Nothing here depends on the layout, so any layout sees the same global batches (design invariant 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bigtrain.config import Config


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything the data order and the schedules need."""

    step: int = 0
    """Optimizer steps done (skipped ones included)."""
    samples: int = 0
    """Sequences consumed; with nothing left out (`sample_id`), the number of the next sample."""
    tokens: int = 0
    """Tokens consumed: samples x sequence length."""


@dataclass(frozen=True)
class BatchSchedule:
    """Sequences in the global batch of every step: constant, or growing in equal rises at the start."""

    full: int
    start: int
    ramp_steps: int

    @staticmethod
    def of(config: Config) -> BatchSchedule:
        """From [train], in sequences whatever unit the config uses."""
        t = config.train
        per = 1 if t.global_batch is not None else config.data.sequence_length
        full = (t.global_batch or t.global_batch_tokens or 0) // per
        start = full if t.batch_ramp_from is None else t.batch_ramp_from // per
        return BatchSchedule(full=full, start=start, ramp_steps=t.batch_ramp_steps or 0)

    @property
    def unit(self) -> int:
        """Every batch size is a multiple of this: the largest common divisor of first and full batch."""
        return math.gcd(self.full, self.start)

    def size(self, step: int) -> int:
        """Sequences in step number `step` (from 0)."""
        if step >= self.ramp_steps:
            return self.full
        rises = (self.full - self.start) // self.unit
        return self.start + rises * step // self.ramp_steps * self.unit

    def total_steps(self, config: Config, progress: Progress) -> int:
        """Steps of the whole run: train.steps, or the first step at which train.tokens are reached.

        `progress` is where the run stands, so that a global batch changed on resume counts from there on.
        """
        if config.train.steps is not None:
            return config.train.steps
        assert config.train.tokens is not None, "validated: steps or tokens"
        step, left = progress.step, config.train.tokens - progress.tokens
        while left > 0 and step < self.ramp_steps:
            left -= self.size(step) * config.data.sequence_length
            step += 1
        return step + max(0, -(-left // (self.full * config.data.sequence_length)))

    def samples(self, steps: int) -> int:
        """Sequences in the first `steps` steps."""
        rising = min(steps, self.ramp_steps)
        return sum(self.size(step) for step in range(rising)) + (steps - rising) * self.full


def batch_problem(schedule: BatchSchedule, microbatch: int, data_size: int) -> str:
    """Why some global batch does not divide into whole microbatches on every data rank; "" when all do."""
    if schedule.unit % (microbatch * data_size) == 0:
        return ""
    ramp = f" (rising from {schedule.start})" if schedule.start != schedule.full else ""
    fits = [m for m in range(1, schedule.unit + 1) if schedule.unit % (m * data_size) == 0]
    smaller = [m for m in fits if m <= microbatch]
    return (
        f"train.global_batch: {schedule.full} sequences{ramp} do not divide into microbatches of {microbatch} on "
        f"{data_size} data ranks; "
        + (
            f"microbatch = {max(smaller)} fits"
            if smaller
            else f"use a global batch that is a multiple of {data_size}"
        )
    )


LeftOut = Sequence[tuple[int, int]]
"""Ranges [first, last] of samples that a run does not read, in order and apart from each other (`united`)."""


def sample_id(number: int, left_out: LeftOut) -> int:
    """Which sample of the order is read as the run's number-th (from 0) when `left_out` is passed over."""
    for first, last in left_out:
        if number < first:
            break
        number += last + 1 - first
    return number


def united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same samples as ranges in order, none touching the next."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def rank_samples(
    schedule: BatchSchedule,
    progress: Progress,
    total_steps: int,
    *,
    microbatch: int,
    data_rank: int,
    data_size: int,
    left_out: LeftOut = (),
) -> Iterator[list[list[int]]]:
    """For every step left: this rank's microbatches as lists of sample numbers.

    The global batch of a step is one contiguous range of samples, `left_out` passed over. Microbatch i of rank r
    holds the samples [(i x data_size + r) x microbatch, + microbatch) of that range.
    """
    first = progress.samples
    for step in range(progress.step, total_steps):
        size = schedule.size(step)
        stride = microbatch * data_size
        starts = range(first + data_rank * microbatch, first + size, stride)
        yield [[sample_id(n, left_out) for n in range(s, s + microbatch)] for s in starts]
        first += size
