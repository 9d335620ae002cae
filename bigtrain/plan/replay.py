"""Seconds of a step from the work that a dry run wrote down: item by item, instead of by formulas for a layer.

A rank has a stream that computes and one for each axis that communicates. Work is charged as `bigtrain.plan.steptime`
charges it, by the same constants; what differs from there is counted instead of assumed: which kernels run, what is
sent, how long code goes on before it waits for that, and in a pipeline the order of the schedule itself.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bigtrain.parallel.schedule import Action, chunks_of_rank, orders, simulate
from bigtrain.plan.activations import bytes_of
from bigtrain.plan.constants import CONSTANTS, Constants
from bigtrain.plan.dryrun import DryRun, StageRun
from bigtrain.plan.flops import visible_keys
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.job import Job
from bigtrain.plan.measuring import Step
from bigtrain.plan.memory import layers_of_stages
from bigtrain.plan.oplog import Compute, Item, Mark, Wait
from bigtrain.plan.steptime import Rates, latency, launches, link_rate, rates_of
from bigtrain.plan.traffic import Sent

Parts = defaultdict[str, float]
"""Seconds by what they go into."""

BLOCKS = "blocks"
"""The part of computing that is of the model's blocks, whose kernels the CPU may be too slow to launch."""
LOSS = "bigtrain::linear_cross_entropy"


@dataclass(frozen=True)
class Replayed:
    """Seconds of a step, of the fullest rank where they are not those of all."""

    total: float
    parts: dict[str, float]
    """compute; optimizer; fixed; bubble, with the messages of a pipeline; and by axis what nothing hid."""


@dataclass
class Clock:
    """A rank's streams while its log is read."""

    now: float = 0.0
    free: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """When an axis has sent all that it was given."""
    ends: list[tuple[str, float]] = field(default_factory=list)
    """Axis and end of every collective or message, in the order of their starts."""
    spent: Parts = field(default_factory=lambda: Parts(float))
    beside: list[tuple[str, float]] = field(default_factory=list)
    """Axes and ends of what DeepSpeed sends on a stream of its own."""

    def spend(self, part: str, seconds: float) -> None:
        """The rank is busy, or waits, for so long."""
        self.now += seconds
        self.spent[part] += seconds


class Charges:
    """What an item of work takes on a cluster."""

    def __init__(self, job: Job, cluster: Cluster, constants: Constants | None = None) -> None:
        self.job, self.cluster, self.k = job, cluster, constants or CONSTANTS
        self.rates: Rates = rates_of(job, cluster, self.k)
        self.seen = _seen(job)
        self.launches = launches(job, self.k)
        """Of a layer, forward and backward."""

    def compute(self, item: Compute) -> float:
        """Seconds of a kernel."""
        traffic = item.bytes / self.rates.bandwidth
        if item.op == LOSS:
            return self._loss(item)
        if "attention" in item.op:
            share = 1.0 if item.op.startswith("bigtrain::") else self.seen
            return max(traffic, item.flops * share / self.rates.scores)
        if not item.flops or not item.dims:
            return traffic
        return max(traffic, self._product(item.flops, item.dims))

    def _product(self, flops: float, dims: Sequence[int]) -> float:
        rows, inner, columns, _ = dims
        odd = self.k.odd if self.job.precision != "fp32" and (inner % 8 or columns % 8) else 1.0
        return (
            (flops + self.k.half) / (self.rates.wide * odd) * (1 + self.k.narrow / min(rows, inner, columns))
        )

    def _loss(self, item: Compute) -> float:
        """Its products, and passes over the logits: see steptime.time_of."""
        rows, inner, columns, _ = item.dims
        one = 2.0 * rows * inner * columns
        count = round(item.flops / one)
        passes = 6 if count == 3 else 2
        return (
            count * self._product(one, item.dims)
            + passes * rows * columns * bytes_of(self.job) / self.rates.bandwidth
        )

    def beside(self, item: Sent) -> bool:
        """Whether DeepSpeed sends it on a stream of its own on a GPU: on a CPU, as here, its ZeRO 3 waits at once."""
        return self.job.zero == 3 and item.op == "reduce-scatter" and item.axis in ("data", "replica")

    def sent(self, item: Sent) -> float:
        """Seconds of a collective or message on an idle network."""
        seconds = item.bytes / link_rate(self.cluster, self.k, item.ranks, item.stride)
        return seconds + latency(self.cluster, self.k, item.ranks, item.ranks * item.stride)


def is_update(item: Compute) -> bool:
    """Whether it is of the optimizer's update, or of the gradients' norm or clipping before it."""
    return item.op.startswith(("_fused_adam", "_foreach", "_fused_sgd"))


def _seen(job: Job) -> float:
    """Of the scores that torch's formula counts, the share that its fused attention computes."""
    if job.masked or job.model.objective != "causal":
        return 1.0
    if (
        job.context > 1 and job.context_by == "gather"
    ):  # of a rank's late queries only the last keys are left out
        return 2 * job.context / (2 * job.context + 1)
    return visible_keys(job.model, job.sequence_length) / job.sequence_length**2


def replay(dry: DryRun, job: Job, cluster: Cluster, constants: Constants | None = None) -> Replayed:
    """The step of a dry run of all pipeline stages, on a cluster."""
    charges = Charges(job, cluster, constants)
    k = charges.k
    slower = 1 + k.straggle * math.log2(cluster.nodes)
    spent = _pipelined(dry, job, charges) if job.pipeline > 1 else _alone(dry, job, charges)
    parts = {
        name: seconds * (slower if name in (BLOCKS, "compute", "bubble") else 1.0)
        for name, seconds in spent.items()
    }
    parts["compute"] += parts.pop(BLOCKS, 0.0)
    parts["fixed"] = k.fixed
    return Replayed(sum(parts.values()), parts)


def _alone(dry: DryRun, job: Job, charges: Charges) -> Parts:
    """Without a pipeline: one step's log, and what one microbatch more adds as often as it comes."""
    (stage,) = dry.stages
    clocks = [_read(stage, step, charges) for step in stage.steps]
    spent = clocks[0].spent
    if len(clocks) > 1:
        (last, before), (m, other) = (
            (clock.spent for clock in clocks),
            (step.microbatches for step in stage.steps),
        )
        times = (dry.microbatches - m) / (other - m)
        spent = Parts(float, {n: last[n] + times * (before[n] - last[n]) for n in {*last, *before}})
    _wait_for_launches(spent, job.microbatches * job.model.layers * charges.launches)
    return spent


def _wait_for_launches(spent: Parts, seconds: float) -> None:
    """The blocks' kernels take no less than their launches."""
    spent["compute"] += max(0.0, seconds - _in_blocks(spent))


def _in_blocks(spent: Parts) -> float:
    return sum(spent.get(part, 0.0) for part in (BLOCKS, "tensor", "context"))


def _read(stage: StageRun, step: Step, charges: Charges) -> Clock:
    clock = Clock()
    for item in _items(stage, step):
        _advance(clock, item, charges)
    _wait_for_sides(clock, 0)
    return clock


def _items(stage: StageRun, step: Step) -> Iterator[Item]:
    return (stage.table[number] for number in step.log)


def _advance(clock: Clock, item: Item, charges: Charges, *, messages: bool = True) -> None:
    """One item; `messages` False: sends and receives take no time here, for the schedule knows when they come."""
    if isinstance(item, Compute):
        if is_update(item):
            _wait_for_sides(clock, 0)
        part = "optimizer" if is_update(item) else BLOCKS if item.block else "compute"
        clock.spend(part, charges.compute(item))
    elif isinstance(item, Sent):
        timed = messages or item.op not in ("send", "recv")
        _send(clock, item, charges, charges.sent(item) if timed else 0.0)
    elif isinstance(item, Wait):
        _wait(clock, *clock.ends[-item.back])


def _send(clock: Clock, item: Sent, charges: Charges, took: float) -> None:
    beside = charges.beside(item)
    start = max(clock.now, clock.free[item.axis])
    end = clock.free[item.axis] = start + took
    clock.ends.append((item.axis, 0.0 if beside else end))  # 0: the wait that follows does not wait
    if took and (beside or not item.waits):  # what runs beside it is slowed: constants.hidden
        clock.spend(item.axis, (1 - charges.k.hidden) * took)
        clock.free[item.axis] -= min(took, (1 - charges.k.hidden) * took)
    if beside:
        clock.beside.append((item.axis, end))
        _wait_for_sides(clock, _SIDES)


_SIDES = 2
"""DeepSpeed's max_param_reduce_events: reductions under way before it waits for the oldest."""


def _wait(clock: Clock, axis: str, end: float) -> None:
    if end > clock.now:
        clock.spend(axis, end - clock.now)


def _wait_for_sides(clock: Clock, most: int) -> None:
    while len(clock.beside) > most:
        _wait(clock, *clock.beside.pop(0))


_SHARES = {"F": 1 / 3, "B": 2 / 3, "I": 1 / 3, "W": 1 / 3}
"""Of a microbatch's kernels: those of F and B, or of F, I and W."""
Segment = tuple[str, int]
"""Kind of an action and its chunk."""


def _pipelined(dry: DryRun, job: Job, charges: Charges) -> Parts:
    """Every action's mean time in the executed step, then the whole schedule with these."""
    costs: dict[Segment, Parts] = {}
    ends: list[Parts] = []
    for stage in dry.stages:
        found, outside = _segments(stage, charges)
        costs |= found
        ends.append(outside)
    count = job.pipeline * job.chunks
    held = layers_of_stages(job.model, job.pipeline, job.chunks, job.schedule, job.split, job.sequence_length)
    chunks = chunks_of_rank(job.schedule, job.pipeline, job.chunks)
    for rank, mine in enumerate(held):
        for chunk, (layers, _, _) in zip(chunks[rank], mine, strict=True):
            actions = {kind: costs[kind, chunk] for kind in _SHARES if (kind, chunk) in costs}
            short = layers * charges.launches - sum(map(_in_blocks, actions.values()))
            for kind, parts in actions.items():
                parts["compute"] += max(0.0, short) * _SHARES[kind]
    seconds = {key: sum(parts.values()) for key, parts in costs.items()}
    forward, inputs, weights = (
        [sum(seconds.get((kind, c), 0.0) for kind in kinds) for c in range(count)]
        for kinds in ("F", "BI", "W")
    )
    work = orders(job.schedule, job.pipeline, job.chunks, job.microbatches)
    line = simulate(work, forward, inputs, weights, _hop(dry, charges))
    busiest = max(range(job.pipeline), key=lambda rank: line.busy[rank])
    spent = Parts(float)
    for chunk in chunks[busiest]:
        for (_, c), parts in costs.items():
            for name, value in parts.items() if c == chunk else ():
                spent[name] += job.microbatches * value
    spent["bubble"] += line.makespan - line.busy[busiest]
    for name in {name for end in ends for name in end}:
        spent[name] += max(end[name] for end in ends)
    return spent


def _segments(stage: StageRun, charges: Charges) -> tuple[dict[Segment, Parts], Parts]:
    """Mean seconds by part of each kind of action, and those before and after the schedule."""
    clock, now = Clock(), None
    sums: defaultdict[Segment, Parts] = defaultdict(lambda: Parts(float))
    times: Counter[Segment] = Counter()
    outside = Parts(float)
    step = stage.steps[0]

    def close(action: Action | None) -> None:
        into = outside if action is None else sums[action.kind, action.chunk]
        for name, value in clock.spent.items():
            weights = action is not None and action.kind == "W" and name == "compute"
            into[BLOCKS if weights else name] += value
        clock.spent.clear()

    for item in _items(stage, step):
        if isinstance(item, Mark):
            close(now)
            now = item.action
            if now is not None:
                times[now.kind, now.chunk] += 1
        else:
            _advance(clock, item, charges, messages=False)
    close(now)
    means = {key: Parts(float, {n: v / times[key] for n, v in parts.items()}) for key, parts in sums.items()}
    return means, outside


def _hop(dry: DryRun, charges: Charges) -> float:
    """Seconds of a message between stages."""
    sends = [
        item for stage in dry.stages for item in stage.table if isinstance(item, Sent) and item.op == "send"
    ]
    return max((charges.sent(item) for item in sends), default=0.0)
