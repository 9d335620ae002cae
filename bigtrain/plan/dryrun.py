"""The dry run: execute the real code for one rank of every pipeline stage, without the ranks and without the numbers.

Model, wrappers, engine (DeepSpeed's too), optimizer and schedule run as in training, at any number of ranks, in this
process. What a GPU would hold of tensors comes out exactly, and so do operations and messages; what a GPU needs besides
tensors (`StageMemory.unseen`) does not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bigtrain.budget import BatchSchedule
from bigtrain.config import Config
from bigtrain.errors import UserError
from bigtrain.grid import Grid, grid_of
from bigtrain.parallel.schedule import Timeline, orders, rounds
from bigtrain.plan.fakeworld import fake_world
from bigtrain.plan.job import at_longest
from bigtrain.plan.likegpu import like_gpu
from bigtrain.plan.measuring import Measured, Step, measure
from bigtrain.plan.oplog import Item
from bigtrain.plan.storages import Held, by_kind
from bigtrain.plan.traffic import Totals

SHOWN = 12
"""Tensors at the peak that are kept of each stage."""


@dataclass(frozen=True)
class StageRun:
    """One rank of a pipeline stage, over one step."""

    stage: int
    rank: int
    """Which rank it was: the stage's first, on all other axes 0."""
    peak: int
    """Most bytes of tensors held at once in a step."""
    by_kind: dict[str, int]
    """The same by kind; see `bigtrain.plan.storages.KINDS`."""
    largest: list[Held]
    """The largest tensors held then."""
    static: int
    """Bytes between steps."""
    setup: int
    """Most bytes held while the engine is made, without what making initial values takes (one chunk at a time)."""
    flops: int
    """Executed in a step, by torch.utils.flop_counter's formulas."""
    recomputed: int
    """How many of these are done twice: recomputation, and the scores in fused attention's backward."""
    kernels: int
    """Operations that launch a kernel in a step."""
    traffic: Totals
    """(axis, kind of collective) -> calls, bytes that this rank sends in a step."""
    steps: tuple[Step, ...]
    """As executed, for `bigtrain.plan.replay`: one step of `DryRun.executed` microbatches, one of another number."""
    table: list[Item]

    @property
    def most(self) -> int:
        """What the card must hold: in a step or before the first one."""
        return max(self.peak, self.setup)


@dataclass(frozen=True)
class DryRun:
    """What came out."""

    config: Config
    grid: Grid
    microbatches: int
    """Of each data rank in a step."""
    executed: int
    """Microbatches that were executed; peak and everything else are those of all."""
    stages: list[StageRun]
    seconds: float
    """That the dry run took."""

    @property
    def flops(self) -> int:
        """Executed in a step by all ranks, if all of a stage do what the executed one does."""
        return sum(s.flops for s in self.stages) * self.grid.world // self.grid.pipeline


def dry_run(
    config: Config,
    ranks: int,
    stages: Sequence[int] | None = None,
    *,
    as_gpu: bool = True,
    whole: bool = False,
    told: Callable[[StageRun], None] | None = None,
) -> DryRun:
    """Run one step of `config` on `ranks` ranks dry, for each of these pipeline stages (all).

    as_gpu=False runs the code that a CPU would. whole=True executes all microbatches, even where fewer show all
    there is. `told` hears of each stage as it is done. Raises UserError when the layout cannot work on so many ranks,
    for a stage that is not there, and inside of a world of real ranks.
    """
    started = time.perf_counter()
    grid = grid_of(config, ranks)
    config = at_longest(config)
    wanted = range(grid.pipeline) if stages is None else stages
    if unknown := [s for s in wanted if not 0 <= s < grid.pipeline]:
        raise UserError(
            f"there is no pipeline stage {', '.join(map(str, unknown))}",
            do=f"name some of 0 to {grid.pipeline - 1}",
        )
    B, data = config.train.microbatch, grid.data
    microbatches = BatchSchedule.of(config).full // (B * data)
    counts = counts_of(config, grid, microbatches, whole)
    found = []
    for stage in wanted:
        rank = stage * (grid.world // grid.pipeline)
        found.append(_stage(stage, rank, _run(config, ranks, rank, counts, as_gpu), microbatches))
        if told is not None:
            told(found[-1])
    return DryRun(config, grid, microbatches, counts[-1], found, time.perf_counter() - started)


def _run(config: Config, ranks: int, rank: int, counts: Sequence[int], as_gpu: bool) -> Measured:
    with fake_world(config, ranks, rank) as mesh:
        if not as_gpu:
            return measure(config, mesh, counts)
        with like_gpu():
            return measure(config, mesh, counts)


def _stage(stage: int, rank: int, run: Measured, microbatches: int) -> StageRun:
    """A stage's figures, those of work brought to all microbatches: they grow evenly from one to the next."""
    last, before = run.steps[-1], run.steps[-2]
    more, step = microbatches - last.microbatches, before.microbatches - last.microbatches
    assert more % (step or 1) == 0

    def grown(now: float, then: float) -> float:
        return now + (more // step * (then - now) if step else 0)

    traffic: Totals = {}
    for key in {*last.work.traffic, *before.work.traffic}:
        (calls, size), (other_calls, other_size) = (s.work.traffic.get(key, (0, 0.0)) for s in (last, before))
        traffic[key] = round(grown(calls, other_calls)), grown(size, other_size)
    flops, again, kernels = (
        round(grown(getattr(last.work, name), getattr(before.work, name)))
        for name in ("flops", "again", "kernels")
    )
    return StageRun(
        stage=stage,
        rank=rank,
        peak=last.peak,
        by_kind=by_kind(last.held),
        largest=last.held[:SHOWN],
        static=run.static,
        setup=run.setup,
        flops=flops,
        recomputed=again,
        kernels=kernels,
        traffic=traffic,
        steps=(last, before) if step else (last,),
        table=run.table,
    )


def counts_of(config: Config, grid: Grid, microbatches: int, whole: bool) -> list[int]:
    """Microbatches of the steps to execute. The last step's peak is that of a step of all `microbatches`.

    The first step makes what is made when it is needed, and is how ZeRO 3 learns the order of the weights. Where fewer
    microbatches than all show the peak, the last but one has one more than the last.
    """
    some = microbatches if whole else enough(config, grid, microbatches)
    if some + 1 >= microbatches:
        return [microbatches, microbatches]
    return [some + 1, some] if grid.pipeline > 1 else [some, some + 1, some]


def enough(config: Config, grid: Grid, microbatches: int) -> int:
    """The fewest microbatches that hold as much as all of them do.

    Without a pipeline 2: the first makes the gradients, later ones add to them. With one, as many as fill the schedule
    as far as all do, on every rank; gpipe holds all.
    """
    if grid.pipeline == 1:
        return min(microbatches, 2)
    layout = config.layout

    @functools.cache
    def filled(m: int) -> tuple[list[int], list[int]]:
        work = orders(layout.schedule, grid.pipeline, layout.chunks, m)
        line = Timeline(work, [], 0.0, [])
        return line.in_flight("BI"), line.in_flight("BW")

    same_round = len(rounds(grid.pipeline, microbatches)[0])
    for m in range(min(grid.pipeline + 1, microbatches), microbatches):
        if len(rounds(grid.pipeline, m)[0]) == same_round and filled(m) == filled(microbatches):
            return m
    return microbatches
