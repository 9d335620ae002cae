"""How many steps, how many sequences in each: pure functions of the config and of where the run stands.

Nothing here depends on the layout, so any layout sees the same global batches (design invariant 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bigtrain.config import Config


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything the data order and the schedules need."""

    step: int = 0
    """Optimizer steps done (skipped ones included)."""
    samples: int = 0
    """Sequences consumed; with nothing left out (`sample_id`), the number of the next sample."""
    tokens: int = 0
    """Tokens consumed: the samples' sequence lengths."""


LeftOut = Sequence[tuple[int, int]]
"""Ranges [first, last] of samples that a run does not read, in order and apart from each other (`united`)."""


class Length(NamedTuple):
    """A sequence length that holds from a sample on."""

    sample: int
    tokens: int
    """S of one sequence."""
    batch: int
    """Sequences in the full global batch."""


@dataclass(frozen=True)
class BatchSchedule:
    """Sequences in the global batch of every step, and their length.

    The batch is constant, or grows in equal rises at the start. Where the length changes, a batch that was given in
    tokens keeps its tokens.
    """

    full: int
    start: int
    ramp_steps: int
    length: int = 1
    """Tokens S of a sequence at the start."""
    later: tuple[Length, ...] = ()
    """Other lengths, in the order of their samples."""

    @staticmethod
    def of(config: Config) -> BatchSchedule:
        """From [train] and [data], in sequences whatever unit the config uses."""
        t = config.train
        S, *changes = (Length(sample, S, _full(config, S)) for sample, S in config.data.lengths.items())
        start = S.batch
        if t.batch_ramp_from is not None:
            start = t.batch_ramp_from // (1 if t.global_batch is not None else S.tokens)
        return BatchSchedule(S.batch, start, t.batch_ramp_steps or 0, S.tokens, tuple(changes))

    @property
    def unit(self) -> int:
        """Every batch size is a multiple of this: the largest common divisor of all."""
        return math.gcd(self._rise, *(length.batch for length in self.later))

    @property
    def _rise(self) -> int:
        return math.gcd(self.full, self.start)

    def size(self, step: int) -> int:
        """Sequences in step number `step` (from 0), at the first length."""
        if step >= self.ramp_steps:
            return self.full
        rises = (self.full - self.start) // self._rise
        return self.start + rises * step // self.ramp_steps * self._rise

    def at(self, step: int, sample: int) -> tuple[int, int]:
        """Sequences in step number `step`, which begins with sample number `sample`, and tokens S of each."""
        for length in reversed(self.later):
            if sample >= length.sample:
                return length.batch, length.tokens
        return self.size(step), self.length

    def walk(self, progress: Progress, left_out: LeftOut = ()) -> Iterator[tuple[Progress, int, int]]:
        """Every step from `progress` on: where the run stands before it, its sequences, and tokens S of each."""
        while True:
            size, length = self.at(progress.step, sample_id(progress.samples, left_out))
            yield progress, size, length
            progress = Progress(progress.step + 1, progress.samples + size, progress.tokens + size * length)

    def _changes(self, step: int) -> bool:
        """Whether steps from `step` on are not all alike."""
        return step < self.ramp_steps or bool(self.later)

    def total_steps(self, config: Config, progress: Progress, left_out: LeftOut = ()) -> int:
        """Steps of the whole run: train.steps, or the first step at which train.tokens are reached.

        `progress` is where the run stands, so that a global batch changed on resume counts from there on.
        """
        if config.train.steps is not None:
            return config.train.steps
        tokens = config.train.tokens
        assert tokens is not None, "validated: steps or tokens"
        now = next(
            p for p, *_ in self.walk(progress, left_out) if p.tokens >= tokens or not self._changes(p.step)
        )
        return now.step + max(0, -(-(tokens - now.tokens) // (self.full * self.length)))

    def ahead(self, progress: Progress, total_steps: int, left_out: LeftOut = ()) -> Progress:
        """Where a run that stands at `progress` will stand after `total_steps` steps."""
        now = next(
            p for p, *_ in self.walk(progress, left_out) if p.step >= total_steps or not self._changes(p.step)
        )
        rest = max(0, total_steps - now.step) * self.full
        return Progress(max(now.step, total_steps), now.samples + rest, now.tokens + rest * self.length)

    def length_problem(self, progress: Progress, total_steps: int, left_out: LeftOut = ()) -> str:
        """Why a step of those to come would have sequences of two lengths; "" when none has."""
        for now, size, length in self.walk(progress, left_out):
            if not self.later or now.step >= total_steps:
                break
            first, last = (sample_id(n, left_out) for n in (now.samples, now.samples + size - 1))
            if self.at(now.step, last)[1] != length:
                begins = next(each.sample for each in self.later if first < each.sample <= last)
                return (
                    f"data.stages: the sequence length changes at sample {begins}, inside step {now.step + 1} (samples "
                    f"{first} to {last}); let the stage begin at sample {first} or {last + 1}"
                )
            if now.step < self.ramp_steps and length != self.length:
                return (
                    f"data.stages: the sequence length changes in step {now.step + 1}, while the batch still grows; "
                    f"let it change after step {self.ramp_steps}, or lower train.batch_ramp_steps"
                )
        return ""


def _full(config: Config, length: int) -> int:
    """Sequences of the full global batch at a sequence length."""
    t = config.train
    return t.global_batch if t.global_batch is not None else (t.global_batch_tokens or 0) // length


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
    stride = microbatch * data_size
    for now, size, _ in schedule.walk(progress, left_out):
        if now.step >= total_steps:
            return
        starts = range(now.samples + data_rank * microbatch, now.samples + size, stride)
        yield [[sample_id(n, left_out) for n in range(s, s + microbatch)] for s in starts]
