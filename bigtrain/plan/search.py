"""The best layout for a config on a cluster: every legal one, its memory and its step time, compared.

`Rules` is the arithmetic of `bigtrain.grid.world_problems` and `bigtrain.config.layout_problems` without their
sentences, a hundred times faster; a test holds the two equal.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bigtrain.budget import BatchSchedule
from bigtrain.config import Config, LayoutConfig
from bigtrain.errors import UserError
from bigtrain.plan.calibration import NEUTRAL, Calibration
from bigtrain.plan.constants import Constants
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.job import Job, job_of
from bigtrain.plan.memory import memory_of
from bigtrain.plan.steptime import PARTS, StepTime

MOST_CHUNKS = 8
"""Pieces of a pipeline rank that are tried; more would only send more messages for a smaller bubble."""

NEARLY = 1.5
"""Layouts that need up to so many times a card's memory are told as those that would be faster."""

EQUAL = 1e-6
"""Share by which step times may differ and still be the same: of another processor's rounding."""

QUICK = {"tensor": 8, "context": 1, "microbatch": 8}
"""Largest axes and microbatch of a quick search."""

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Rules:
    """Which layouts can run: the config's facts, and `allows`."""

    world: int
    lstm: bool
    heads: int
    kv_heads: int
    layers: int
    sequence_length: int
    """What all sequence lengths of the run are multiples of."""
    batch_unit: int
    """Every global batch is a multiple of so many sequences."""
    muon: bool
    offload: bool

    @staticmethod
    def of(config: Config, world: int, *, offload: bool) -> Rules:
        """Of a config without its [layout]."""
        m = config.model
        lstm = m.kind == "lstm"
        return Rules(
            world=world,
            lstm=lstm,
            heads=1 if lstm else m.num_heads,
            kv_heads=1 if lstm else m.num_kv_heads,
            layers=m.layers,
            sequence_length=math.gcd(*config.data.lengths.values()),
            batch_unit=BatchSchedule.of(config).unit,
            muon=config.optim.kind == "muon",
            offload=offload,
        )

    def allows(self, job: Job) -> bool:
        """Whether this layout runs on `world` ranks; the data axis is what the others leave."""
        each = job.tensor * job.pipeline * job.context
        return (
            self.world % each == 0
            and self.axes(job.tensor, job.pipeline, job.context)
            and self.exchange(job.tensor, job.context, job.context_by)
            and self.pieces(job.pipeline, job.schedule, job.chunks)
            and self.sharding(job.zero, job.tensor, job.pipeline)
            and self.batch(job.microbatch, self.world // each)
            and (not job.sequence or self.tokens(job.microbatch, job.tensor, job.context))
        )

    def axes(self, tensor: int, pipeline: int, context: int) -> bool:
        """Heads against tensor ranks, layers against stages."""
        if self.lstm:
            return tensor == pipeline == context == 1
        return (pipeline == 1 or pipeline <= self.layers) and _shares(self.heads, self.kv_heads, tensor)

    def exchange(self, tensor: int, context: int, by: str) -> bool:
        """The sequence, and with Ulysses the heads, against context ranks."""
        if by == "ulysses" and not self.lstm:
            here, kv = self.heads // tensor, max(1, self.kv_heads // tensor)
            if not _shares(here, kv, context):
                return False
        return context == 1 or self.sequence_length % (context * (2 if by == "gather" else 1)) == 0

    def pieces(self, pipeline: int, schedule: str, chunks: int) -> bool:
        """The schedule against chunks, and these against layers."""
        right = {"zbv": chunks == 2, "interleaved": chunks >= 2, "interleaved-zb": chunks >= 2}
        fits = pipeline == 1 or self.lstm or pipeline * chunks <= self.layers
        return fits and right.get(schedule, chunks == 1)

    def sharding(self, zero: int, tensor: int, pipeline: int) -> bool:
        """What ZeRO, the optimizer and the pipeline can do together."""
        if zero == 3 and (pipeline > 1 or self.lstm):
            return False
        if self.muon and (zero > 0 or tensor > 1):
            return False
        return not (self.offload and zero == 0)

    def batch(self, microbatch: int, data: int) -> bool:
        """Whole microbatches on every data rank, in every step."""
        return self.batch_unit % (microbatch * data) == 0

    def tokens(self, microbatch: int, tensor: int, context: int) -> bool:
        """A microbatch's tokens against tensor ranks that share norms and residuals."""
        return tensor == 1 or microbatch * self.sequence_length // context % tensor == 0


def _shares(heads: int, kv_heads: int, ranks: int) -> bool:
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def layouts(
    base: Job, rules: Rules, *, quick: bool = False, recompute: Sequence[Recompute] = RECOMPUTE
) -> Iterator[Job]:
    """Every layout that can run on all ranks; of layouts that do the same work, one. `quick`: some hundreds of them.

    Left out as never better: `sequence = false` where true works (the same traffic, more memory), GPipe (1F1B's
    bubble, more memory), the exchange of a context axis of 1, more than MOST_CHUNKS chunks, and chunks with too few
    microbatches to fill the pipeline, where the formula of the bubble does not hold. For one process only
    the microbatch and what is recomputed are chosen.
    """
    if rules.world == 1:
        for microbatch, again in itertools.product(_divisors(rules.batch_unit), recompute):
            yield dataclasses.replace(base, microbatch=microbatch, recompute=again)
        return
    for tensor, pipeline, context, data in _axes(rules):
        if quick and (tensor > QUICK["tensor"] or context > QUICK["context"]):
            continue
        for by in ("gather", "ulysses") if context > 1 else ("gather",):
            if not rules.exchange(tensor, context, by):
                continue
            for microbatch in _divisors(rules.batch_unit // data):
                if quick and microbatch > QUICK["microbatch"]:
                    break
                sequence = rules.tokens(microbatch, tensor, context)
                count = base.global_batch // (microbatch * data)
                for schedule, chunks in _schedules(rules, pipeline, count, quick):
                    for zero in (z for z in range(4) if rules.sharding(z, tensor, pipeline)):
                        if zero == 2 and pipeline > 1:
                            continue  # works as ZeRO 1 there (grid.layout_notes)
                        for again in recompute:
                            yield Job(
                                model=base.model,
                                sequence_length=base.sequence_length,
                                global_batch=base.global_batch,
                                microbatch=microbatch,
                                tensor=tensor,
                                sequence=sequence,
                                pipeline=pipeline,
                                schedule=schedule,
                                chunks=chunks,
                                context=context,
                                context_by=by,
                                data=data,
                                zero=zero,
                                optimizer=base.optimizer,
                                offload=rules.offload,
                                recompute=again,
                                precision=base.precision,
                                attention=base.attention,
                                kernels=base.kernels,
                                compiled=base.compiled,
                                software=base.software,
                            )


def _axes(rules: Rules) -> Iterator[tuple[int, int, int, int]]:
    """(tensor, pipeline, context, data) with heads, layers and batch that divide."""
    for tensor in _divisors(rules.world):
        for pipeline in _divisors(rules.world // tensor):
            for context in _divisors(rules.world // tensor // pipeline):
                data = rules.world // tensor // pipeline // context
                if rules.batch_unit % data == 0 and rules.axes(tensor, pipeline, context):
                    yield tensor, pipeline, context, data


def _schedules(rules: Rules, pipeline: int, microbatches: int, quick: bool) -> Iterator[tuple[str, int]]:
    """(schedule, chunks) of a pipeline of so many ranks that so many microbatches fill."""
    if pipeline == 1:
        yield "1f1b", 1
        return
    if quick:
        tried = [("1f1b", 1), ("interleaved", 2), ("interleaved", 4)]
    else:
        tried = [("1f1b", 1), ("zbv", 2)]
        tried += [(name, c) for name in ("interleaved", "interleaved-zb") for c in range(2, MOST_CHUNKS + 1)]
    fill = {"1f1b": 1, "zbv": 2 * pipeline - 1}
    yield from (
        pair
        for pair in tried
        if rules.pieces(pipeline, *pair) and microbatches >= fill.get(pair[0], pipeline)
    )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


@dataclass(frozen=True)
class Layout:
    """A layout with what it takes."""

    job: Job
    bytes: float
    """Of the fullest rank, the upper end of its interval."""
    time: StepTime


@dataclass(frozen=True)
class Found:
    """What the search came to."""

    best: list[Layout]
    """The fastest that fit, one for each set of axes, the winner first; empty when nothing fits."""
    too_large: list[Layout]
    """Faster ones that would need somewhat more memory than the card has."""
    smallest: Layout | None
    """The layout that needs least memory, where nothing fits."""
    tried: int
    """Legal layouts compared."""
    seconds: float
    capacity: float
    """Bytes of one card."""
    offload: bool = False
    """Nothing fits unless the optimizer state goes to host memory."""


@dataclass
class _Top:
    """The fastest layouts, `size` of them, one for each set of axes.

    Times within EQUAL are equal and the plainer layout wins: another processor's rounding must not decide,
    since every rank of a run searches for itself.
    """

    size: int
    kept: dict[tuple[int, int, int], Layout] = field(default_factory=dict)
    slowest: float = math.inf
    """Step time beyond which no layout can become one of `size` any more."""

    def wants(self, job: Job, total: float) -> bool:
        """Whether a layout with this step time may be one of the fastest, and is better than what its axes have."""
        if total > self.slowest * (1 + EQUAL):
            return False
        former = self.kept.get((job.tensor, job.pipeline, job.context))
        return former is None or _before(job, total, former.job, former.time.total)

    def offer(self, layout: Layout) -> None:
        job = layout.job
        if self.wants(job, layout.time.total):
            self.kept[job.tensor, job.pipeline, job.context] = layout
            if len(self.kept) >= self.size:
                self.slowest = sorted(kept.time.total for kept in self.kept.values())[self.size - 1]

    def best(self) -> list[Layout]:
        order = functools.cmp_to_key(_order)
        return sorted(self.kept.values(), key=order)[: self.size]


def _order(one: Layout, other: Layout) -> int:
    return -1 if _before(one.job, one.time.total, other.job, other.time.total) else 1


def _before(one: Job, seconds: float, other: Job, than: float) -> bool:
    gap = seconds / than - 1
    return gap < -EQUAL or (gap <= EQUAL and _plainness(one) < _plainness(other))


def search(
    config: Config,
    cluster: Cluster,
    *,
    constants: Constants | None = None,
    calibration: Calibration = NEUTRAL,
    few: int = 5,
    quick: bool = False,
) -> Found:
    """Compare all legal layouts of `config` on all GPUs of `cluster`; its own [layout] does not count.

    Times and bytes are corrected by `calibration`. `quick` compares some hundreds of the likely ones. When none fits,
    the search is repeated with the optimizer state in host memory. Raises UserError when no layout can run at all:
    heads, layers and batch do not divide among so many ranks, or the engine is made for one process.
    """
    if config.layout.engine == "reference" and cluster.gpus > 1:
        raise UserError(
            "the reference engine runs in one process", where="layout.engine", do='use engine = "auto"'
        )
    asked = _Asked(config, cluster, constants, calibration, few, quick)
    found = _search(asked, offload=config.layout.offload == "optimizer")
    if found.best or found.offload or config.optim.kind == "muon":
        return found
    again = _search(asked, offload=True)
    return again if again.best else found


@dataclass(frozen=True)
class _Asked:
    config: Config
    cluster: Cluster
    constants: Constants | None
    calibration: Calibration
    few: int
    quick: bool

    def time(self, job: Job) -> StepTime:
        """Of a step, corrected."""
        return self.calibration.time(job, self.cluster, self.constants)


def _search(asked: _Asked, *, offload: bool) -> Found:
    began = time.perf_counter()
    config, cluster = asked.config, asked.cluster
    rules, base = Rules.of(config, cluster.gpus, offload=offload and cluster.gpus > 1), base_job(config)
    capacity, more = cluster.gpu.memory_gib * 2**30, asked.calibration.memory_offset(cluster.gpu.name)
    fitting, larger = _Top(asked.few), _Top(3)
    families = 0
    # Recomputing more only takes longer, unless it was measured otherwise: what is not wanted for its time, or fits as
    # it is, needs no more of it.
    measured = bool(asked.calibration.findings)
    for plain in layouts(base, rules, quick=asked.quick, recompute=("none",)):
        families += 1
        kinds = [plain]
        for job in kinds:
            step = asked.time(job)
            wanted = fitting.wants(job, step.total)
            size = fullest(job, NEARLY * capacity - more) + more if wanted else math.inf
            if size <= capacity:
                fitting.offer(Layout(job, size, step))
            elif size <= NEARLY * capacity:
                larger.offer(Layout(job, size, step))
            if not measured and (not wanted or size <= capacity):
                break
            if job is plain:
                least = dataclasses.replace(plain, recompute="full")
                if fullest(least, NEARLY * capacity - more) + more <= NEARLY * capacity:
                    kinds += [dataclasses.replace(plain, recompute="selective"), least]
    if families == 0 and asked.quick:
        return _search(dataclasses.replace(asked, quick=False), offload=offload)
    if families == 0:
        raise _impossible(config, rules)
    best, smallest = fitting.best(), None
    if not best:
        job = min(
            layouts(base, rules, quick=asked.quick, recompute=("full",)),
            key=lambda j: (fullest(j), _plainness(j)),
        )
        smallest = Layout(job, fullest(job) + more, asked.time(job))
    return Found(
        best=best,
        too_large=[lay for lay in larger.best() if not best or lay.time.total < best[0].time.total],
        smallest=smallest,
        tried=families * len(RECOMPUTE),
        seconds=time.perf_counter() - began,
        capacity=capacity,
        offload=offload,
    )


def base_job(config: Config) -> Job:
    """The job of a config on one rank, without its [layout]."""
    alone = {
        "layout": LayoutConfig(kernels=config.layout.kernels),
        "train": config.train.model_copy(update={"microbatch": 1}),
    }
    return job_of(config.model_copy(update=alone), 1)


def fullest(job: Job, enough: float = math.inf) -> float:
    """Bytes of the rank that needs most, the upper end of the interval; of the first, where that is above `enough`.

    It is one of three stages: activations in flight and layers fall from the first stage on, which with a V also has
    the head and therefore fewer layers than the second; the last has the head. With zero bubbles halves of backward
    passes wait on the later stages, and any may be it.
    """
    first = memory_of(job, (0,))[0].high
    if job.pipeline == 1 or first > enough:
        return first
    others = range(1, job.pipeline) if job.zero_bubble else (1, job.pipeline - 1)
    return max(first, *(stage.high for stage in memory_of(job, others)))


def _plainness(job: Job) -> tuple[int, ...]:
    """Of equals the plainer layout wins: fewer axes, less sharding and recomputation, smaller pieces."""
    schedule = ("1f1b", "gpipe", "interleaved", "interleaved-zb", "zbv").index(job.schedule)
    axes = (job.pipeline, job.context, job.tensor)
    return (*axes, job.zero, RECOMPUTE.index(job.recompute), schedule, job.chunks, job.microbatch)


def _impossible(config: Config, rules: Rules) -> UserError:
    """Why no layout at all can run on so many ranks."""
    unit, world = rules.batch_unit, rules.world
    if rules.lstm or (rules.muon and rules.offload):
        what = (
            "an lstm runs data-parallel only" if rules.lstm else "muon cannot offload the optimizer's state"
        )
        return UserError(
            what, where=config.name, do=f"use a global batch that is a multiple of {world}, or fewer ranks"
        )
    below = max(n for n in range(1, world + 1) if _runs(config, n))
    return UserError(
        f"no layout runs on {world} ranks: none of tensor (heads {rules.heads}, {rules.kv_heads} kv), pipeline "
        f"({rules.layers} layers), context (sequences of {rules.sequence_length}) and data (global batch {unit}) "
        "sizes multiply to it",
        where=config.name,
        do=f"use {below} ranks, or a global batch that is a multiple of {world}",
    )


def _runs(config: Config, world: int) -> bool:
    """Whether any layout is legal on so many ranks."""
    rules = Rules.of(config, world, offload=False)
    return next(layouts(base_job(config), rules), None) is not None


def with_layout(config: Config, job: Job) -> Config:
    """The config with a job's layout in it; engine, kernels and threads stay as they are."""
    split = {"split": list(job.split) if job.split else None}
    layout = config.layout.model_copy(
        update={
            "tensor": job.tensor,
            "sequence": job.sequence,
            "pipeline": job.pipeline,
            "schedule": job.schedule,
            "chunks": job.chunks,
            "context": job.context,
            "context_by": job.context_by,
            "zero": job.zero if job.ranks > 1 else config.layout.zero,
            "offload": "optimizer" if job.offload else "none",
            "recompute": job.recompute,
            **split,
        }
    )
    train = config.train.model_copy(update={"microbatch": job.microbatch})
    return config.model_copy(update={"layout": layout, "train": train})


def why_slower(loser: StepTime, winner: StepTime) -> str:
    """The parts in which one step is longer than another, largest first: "bubble +0.21 s"."""
    gap = loser.total - winner.total
    more = {part: getattr(loser, part) - getattr(winner, part) for part in PARTS}
    named = [part for part in sorted(PARTS, key=lambda part: -more[part]) if more[part] > max(0.1 * gap, 0)]
    less = min(PARTS, key=lambda part: more[part])
    text = ", ".join(f"{part} +{more[part]:.3g} s" for part in named[:3])
    return text + (f" (but {less} {more[less]:.3g} s)" if more[less] < -0.1 * max(gap, 1e-12) else "")


def described(job: Job) -> str:
    """A layout in one line: "data 16 x tensor 8, ZeRO 2, recompute full, microbatch 1"."""
    names = ("pipeline", "data", "context", "tensor")
    axes = [f"{name} {getattr(job, name)}" for name in names if getattr(job, name) > 1] or ["one rank"]
    words = [" x ".join(axes)]
    if job.pipeline > 1:
        words.append(job.schedule + (f" of {job.chunks} chunks" if job.chunks > 1 else ""))
    if job.context > 1:
        words.append(f"context by {job.context_by}")
    if job.ranks > 1:
        words.append(f"ZeRO {job.zero}")
    words += [f"recompute {job.recompute}"] if job.recompute != "none" else []
    words += ["optimizer in host memory"] if job.offload else []
    words += ["norms not shared"] if job.tensor > 1 and not job.sequence else []
    return ", ".join([*words, f"microbatch {job.microbatch}"])
