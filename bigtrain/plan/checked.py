"""`plan --dry-run`: the plan's memory beside that of the real code, executed with fake tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from bigtrain.plan.dryrun import DryRun, StageRun
from bigtrain.plan.estimate import Estimate
from bigtrain.plan.quantities import gibibytes, span
from bigtrain.plan.replay import Replayed
from bigtrain.plan.steptime import StepTime
from bigtrain.plan.telling import KINDS

AGREE, SLACK, SLACK_SECONDS = 0.05, 64 * 2**20, 0.01
"""Plan and dry run may differ by this share of the dry run's peak or step, or by so many bytes or seconds: of a toy's
memory a few odd tensors are many percent, of its step a few latencies."""
DRY_KINDS = [kind for kind in KINDS if kind != "unseen"]


@dataclass(frozen=True)
class Check:
    """One pipeline stage: what was planned for tensors, and what the executed code held. Bytes."""

    stage: int
    planned: float
    executed: StageRun

    @property
    def off(self) -> float:
        """Plan over dry run, less 1."""
        return self.planned / self.executed.peak - 1


def checks(e: Estimate, dry: DryRun) -> list[Check]:
    """Every executed stage beside its plan."""
    return [
        Check(run.stage, e.stages[run.stage].total - e.stages[run.stage].unseen, run) for run in dry.stages
    ]


def disagreements(found: Sequence[Check], replayed: Replayed, planned: StepTime) -> list[str]:
    """The stages whose planned memory is wrong, and a wrong time, each in a sentence; none when plan and code agree."""
    wrong = [
        f"stage {c.stage}: {gibibytes(c.planned)} planned, {gibibytes(c.executed.peak)} executed ({c.off:+.1%})"
        for c in found
        if abs(c.planned - c.executed.peak) > max(AGREE * c.executed.peak, SLACK)
    ]
    if abs(planned.total - replayed.total) > max(AGREE * replayed.total, SLACK_SECONDS):
        wrong.append(
            f"a step: {span(planned.total)} planned, {span(replayed.total)} of the executed work "
            f"({planned.total / replayed.total - 1:+.1%}; the plan's own interval is {span(planned.low)} to "
            f"{span(planned.high)})"
        )
    return wrong


def tell_checks(found: Sequence[Check], dry: DryRun, replayed: Replayed, planned: StepTime) -> str:
    """A table of stages, what the fullest one holds at its peak, what a rank sends, and the step's time again."""
    lines = [_heading(dry)]
    lines.append(
        f"{'GiB of tensors':17s}" + "".join(f"{k:>12}" for k in DRY_KINDS) + f"{'peak':>10}{'planned':>10}"
    )
    for name, check in _rows(found):
        cells = "".join(f"{check.executed.by_kind[kind] / 2**30:12.2f}" for kind in DRY_KINDS)
        row = f"{check.executed.peak / 2**30:10.2f}{check.planned / 2**30:10.2f}  ({check.off:+.1%})"
        lines.append(f"  {name:15s}{cells}{row}")
    return "\n".join([*lines, *_held(found), *_sent(found), *_again(replayed, planned)])


def _heading(dry: DryRun) -> str:
    some = (
        ""
        if dry.executed == dry.microbatches
        else f" ({dry.executed} of {dry.microbatches:,} microbatches tell all)"
    )
    ranks = f"{len(dry.stages)} rank{'s' * (len(dry.stages) > 1)}"
    return (
        f"{'dry run':17s}the code of {ranks} executed in {span(dry.seconds)}{some}; "
        f"{dry.flops:.4g} FLOPs a step on all ranks"
    )


def _rows(found: Sequence[Check]) -> Iterator[tuple[str, Check]]:
    """Neighbours that are equal to the MiB share a row."""

    def cells(check: Check) -> tuple[int, ...]:
        return (*(round(n / 2**20) for n in check.executed.by_kind.values()), round(check.planned / 2**20))

    for _, same in groupby(found, key=cells):
        row = list(same)
        first, last = row[0].stage, row[-1].stage
        yield (f"stage {first}" if first == last else f"stages {first}-{last}"), row[0]


def _held(found: Sequence[Check], most: int = 5) -> Iterator[str]:
    """The largest tensors at the peak of the fullest stage."""
    fullest = max(found, key=lambda check: check.executed.peak)
    for i, held in enumerate(fullest.executed.largest[:most]):
        name = f"at stage {fullest.stage}'s peak" if i == 0 else ""
        shape = " x ".join(map(str, held.shape))
        yield f"{name:17s}{gibibytes(held.size):>9}  {held.kind}: {shape} {str(held.dtype)[6:]}, {held.where}"


def _sent(found: Sequence[Check]) -> Iterator[str]:
    """What the rank of the first executed stage sends in a step."""
    for i, ((axis, kind), (calls, size)) in enumerate(sorted(found[0].executed.traffic.items())):
        yield f"{'sent in a step' if i == 0 else '':17s}{gibibytes(size):>9}  in {calls:,} calls: {axis}, {kind}"


def _again(replayed: Replayed, planned: StepTime) -> Iterator[str]:
    """The step's seconds from the executed work, by what they go into."""
    off = f"{planned.total / replayed.total - 1:+.1%}"
    yield f"{'replayed':17s}{span(replayed.total):>9}  a step of this work, and {span(planned.total)} planned ({off}):"
    parts = sorted(replayed.parts.items(), key=lambda part: -part[1])
    most = [f"{name} {span(seconds)}" for name, seconds in parts if seconds > 0.002 * replayed.total]
    yield f"{'':17s}{'':>9}  {', '.join(most)}"


def checks_json(found: Sequence[Check], dry: DryRun, replayed: Replayed, planned: StepTime) -> dict[str, Any]:
    """The same for programs."""
    return {
        "replayed": asdict(replayed),
        "planned_step_seconds": planned.total,
        "seconds": dry.seconds,
        "flops": dry.flops,
        "executed_microbatches": dry.executed,
        "stages": [
            {
                "stage": c.stage,
                "rank": c.executed.rank,
                "planned": c.planned,
                "peak": c.executed.peak,
                "by_kind": dict(c.executed.by_kind),
                "largest": [{**asdict(held), "dtype": str(held.dtype)} for held in c.executed.largest],
                "flops": c.executed.flops,
                "traffic": [
                    {"axis": axis, "kind": kind, "calls": calls, "bytes": size}
                    for (axis, kind), (calls, size) in c.executed.traffic.items()
                ],
            }
            for c in found
        ],
    }
