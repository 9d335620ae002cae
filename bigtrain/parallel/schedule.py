"""Which action each pipeline rank does next: the schedules as pure functions, and a simulation of their time.

The model is cut into chunks, numbered along the data's way; a pipeline rank holds one or several. GPipe is
arXiv 1811.06965; 1F1B and interleaved 2104.04473; the zero-bubble schedules, which split the backward pass in
two, 2401.10241. Tests hold the orders equal, action by action, to those of torch.distributed.pipelining.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
SCHEDULES = ("gpipe", "1f1b", "interleaved", "interleaved-zb", "zbv")


class Action(NamedTuple):
    """One piece of work of a rank; written F3.0 for the forward pass of microbatch 0 through chunk 3."""

    kind: Kind
    """F: forward; B: backward with all gradients; I: gradient of the input only; W: of the weights only."""
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.chunk}.{self.microbatch}"


class Message(NamedTuple):
    """What one chunk hands to its neighbour: `chunk` is the one that receives it."""

    kind: Literal["activation", "gradient"]
    chunk: int
    microbatch: int


Orders = Sequence[Sequence[Action]]
"""The actions of every pipeline rank, in the order in which it does them."""


def chunks_of_rank(schedule: str, pipeline: int, virtual: int) -> list[tuple[int, ...]]:
    """The chunks that each pipeline rank holds; `virtual` of them a rank (1 for gpipe and 1f1b, 2 for zbv).

    zbv goes down the ranks and up again, a V: rank 0 holds the first and the last chunk.
    """
    assert schedule in SCHEDULES, schedule
    assert pipeline >= 1, pipeline
    assert virtual >= 1, virtual
    if schedule == "zbv":
        assert virtual == 2, "a V has two arms"
        return [(rank, 2 * pipeline - 1 - rank) for rank in range(pipeline)]
    assert virtual == 1 or schedule.startswith("interleaved"), f"{schedule} has one chunk a rank"
    return [tuple(range(rank, pipeline * virtual, pipeline)) for rank in range(pipeline)]


def orders(schedule: str, pipeline: int, virtual: int, microbatches: int) -> list[list[Action]]:
    """The compute actions of every pipeline rank, in order, for any number of microbatches."""
    assert microbatches >= 1, microbatches
    chunks = chunks_of_rank(schedule, pipeline, virtual)
    if schedule == "zbv":
        return [_v_order(rank, pipeline, held, microbatches) for rank, held in enumerate(chunks)]
    return [_round_order(schedule, rank, held, pipeline, microbatches) for rank, held in enumerate(chunks)]


def rounds(pipeline: int, microbatches: int) -> list[range]:
    """Microbatches that pass one chunk of a rank together before it turns to its next chunk.

    As many rounds as can each keep all ranks busy (at least `pipeline` microbatches), of equal size or, where they
    do not divide, of sizes one apart. A short last round would be simpler and drain the pipeline: 9 microbatches
    on 4 ranks of 2 chunks lose 20/54 as 4 + 4 + 1, but 9/54 as 5 + 4, the bubble of the formula.
    """
    count = max(1, microbatches // pipeline)
    small, larger = divmod(microbatches, count)
    ends = [i * small + min(i, larger) for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def _round_order(
    schedule: str, rank: int, held: Sequence[int], pipeline: int, microbatches: int
) -> list[Action]:
    """Forwards up to a head start, then one forward and one backward in turn, then the backwards left."""
    batches = rounds(pipeline, microbatches)
    forwards = [(c, m) for batch in batches for c in held for m in batch]
    backwards = [(c, m) for batch in batches for c in reversed(held) for m in batch]
    # A round meets its first backward once it is through all chunks but the last (the first round is the largest).
    # Each rank further from the end is ahead by one forward a hop, or by two, which hide the messages' time: with
    # p = 8, v = 2, m = 32 and a transfer of F/4 the bubble is 28.5 F instead of 52.5 F, for 23 instead of 16
    # chunks in flight. 1F1B and ZB-H1 (2401.10241) choose the memory, 2104.04473 the speed.
    hops = pipeline - 1 - rank
    ahead = (len(held) - 1) * len(batches[0]) + hops * (2 if schedule == "interleaved" else 1)
    if schedule == "gpipe":
        ahead = len(forwards)
    split = schedule == "interleaved-zb"
    order = [Action("F", *at) for at in forwards[:ahead]]
    for i, at in enumerate(backwards):
        order += [Action("F", *f) for f in forwards[ahead + i : ahead + i + 1]]
        order.append(Action("I" if split else "B", *at))
        # A later rank holds fewer activations and can put off as many weight gradients as it is hops from the first.
        if split and i >= rank:
            order.append(Action("W", *backwards[i - rank]))
    return order + [Action("W", *at) for at in backwards[max(0, len(backwards) - rank) :] if split]


def _v_order(rank: int, pipeline: int, held: Sequence[int], microbatches: int) -> list[Action]:
    """Zero-bubble V: a is the rank's chunk on the way down, b the one on the way up.

    Fewer microbatches than fill the V leave out the others of the smallest full schedule.
    """
    p, r, full = pipeline, rank, max(microbatches, 2 * pipeline - 1)
    phases = [
        (2 * (p - r) - 1, "Fa"),  # until the first microbatch is back from the tip of the V
        (r, "Fb Fa"),
        (p - r, "Fb Ib Wb"),
        (full - (2 * p - r - 1), "Fa Ia Wa Fb Ib Wb"),
        (p - r - 1, "Ia Wa Fb Ib Wb"),
        (r, "Ia Ib"),
        (p - r, "Ia Wa"),
        (r, "Wb"),
        (r, "Wa"),
    ]
    kinds: dict[str, Kind] = {"F": "F", "I": "I", "W": "W"}
    done: Counter[str] = Counter()
    order = []
    for times, names in phases:
        for name in names.split() * times:
            order.append(Action(kinds[name[0]], held["ab".index(name[1])], done[name]))
            done[name] += 1
    return [action for action in order if action.microbatch < microbatches]


def needed(action: Action, chunks: int) -> Message | None:
    """What must have come from a neighbour chunk before `action`; `chunks` is the number of all chunks."""
    if action.kind == "F" and action.chunk > 0:
        return Message("activation", action.chunk, action.microbatch)
    if action.kind in "BI" and action.chunk < chunks - 1:
        return Message("gradient", action.chunk, action.microbatch)
    return None


def produced(action: Action, chunks: int) -> Message | None:
    """What `action` hands to a neighbour chunk."""
    if action.kind == "F" and action.chunk < chunks - 1:
        return Message("activation", action.chunk + 1, action.microbatch)
    if action.kind in "BI" and action.chunk > 0:
        return Message("gradient", action.chunk - 1, action.microbatch)
    return None


def holders(work: Orders) -> list[int]:
    """The pipeline rank that holds each chunk."""
    found = {action.chunk: rank for rank, order in enumerate(work) for action in order}
    return [found[chunk] for chunk in range(len(found))]


def messages(work: Orders) -> dict[tuple[int, int], list[Message]]:
    """What each (sender, receiver) pair of ranks exchanges, in the order in which the sender produces it.

    Receives posted in this order match first-in first-out channels; chunks on one rank need no message.
    """
    holder = holders(work)
    channels: dict[tuple[int, int], list[Message]] = {}
    for rank, order in enumerate(work):
        for action in order:
            message = produced(action, len(holder))
            if message is not None and holder[message.chunk] != rank:
                channels.setdefault((rank, holder[message.chunk]), []).append(message)
    return channels


def executed(work: Orders) -> Iterator[tuple[int, Action]]:
    """Every action with its rank, each after the message it needs came; ends early when the ranks are stuck."""
    chunks = 1 + max(action.chunk for order in work for action in order)
    remaining = [iter(order) for order in work]
    arrived: set[Message] = set()
    waiting: dict[Message, tuple[int, Action]] = {}
    ready = [(rank, action) for rank, order in enumerate(remaining) for action in itertools.islice(order, 1)]
    while ready:
        rank, action = ready.pop()
        need = needed(action, chunks)
        if need is not None and need not in arrived:
            waiting[need] = (rank, action)
            continue
        yield rank, action
        ready += [(rank, after) for after in itertools.islice(remaining[rank], 1)]
        message = produced(action, chunks)
        if message is not None:
            arrived.add(message)
            ready += [waiting.pop(message)] if message in waiting else []


def problems(work: Orders, chunks: Sequence[Sequence[int]], microbatches: int) -> list[str]:
    """Why `work` is no training step of `chunks` (those of every rank); empty when it is one."""
    found = []
    for rank, (order, held) in enumerate(zip(work, chunks, strict=True)):
        kinds: defaultdict[tuple[int, int], str] = defaultdict(str)
        for action in order:
            kinds[action.chunk, action.microbatch] += action.kind
        for at in itertools.product(held, range(microbatches)):
            done = kinds.pop(at, "nothing")
            if done not in ("FB", "FIW"):
                found.append(f"rank {rank}: chunk {at[0]}, microbatch {at[1]} does {done}, not FB or FIW")
        found += [f"rank {rank}: chunk {c}, microbatch {m} is not its work" for c, m in kinds]
    if not found:
        done_by = Counter(rank for rank, _ in executed(work))
        stuck = [
            (rank, order[done_by[rank]]) for rank, order in enumerate(work) if done_by[rank] < len(order)
        ]
        found = [f"rank {rank} waits for ever at {action}" for rank, action in stuck]
    return found


class Event(NamedTuple):
    """An action on the clock."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    work: Orders
    events: Sequence[Event]
    makespan: float
    """End of the last action; the first starts at 0."""
    busy: Sequence[float]
    """Time that each rank computes."""

    @property
    def bubble(self) -> float:
        """Time over that of the busiest rank's work alone, as a share of the latter."""
        return self.makespan / max(self.busy) - 1

    def in_flight(self, until: str = "BI") -> list[int]:
        """Most (chunk, microbatch) pairs that each rank holds at once, from F until an action of these kinds.

        "BI" counts activations that wait for the backward pass, "BW" also those kept for weight gradients.
        """
        change = [[(a.kind == "F") - (a.kind in until) for a in order] for order in self.work]
        return [max(itertools.accumulate(c), default=0) for c in change]


Cost = float | Sequence[float]


def simulate(
    work: Orders, forward: Cost, input_grad: Cost, weight_grad: Cost, transfer: float = 0.0
) -> Timeline:
    """Time `work`: each cost is that of every chunk or a sequence over chunks; B costs both gradients.

    `transfer` is the time of a message between two ranks; it delays the receiver and keeps nobody busy.
    """
    holder = holders(work)
    f, i, w = (
        [c] * len(holder) if isinstance(c, int | float) else c for c in (forward, input_grad, weight_grad)
    )
    cost = {"F": f, "I": i, "W": w, "B": [a + b for a, b in zip(i, w, strict=True)]}
    arrival: dict[Message | None, float] = {None: 0.0}
    free, busy = [0.0] * len(work), [0.0] * len(work)
    events = []
    for rank, action in executed(work):
        start = max(free[rank], arrival[needed(action, len(holder))])
        took = cost[action.kind][action.chunk]
        free[rank] = start + took
        busy[rank] += took
        events.append(Event(rank, action, start, free[rank]))
        message = produced(action, len(holder))
        if message is not None:
            arrival[message] = free[rank] + (transfer if holder[message.chunk] != rank else 0.0)
    assert len(events) == sum(map(len, work)), "a schedule runs to its end (see problems)"
    events.sort(key=lambda event: event.start)
    return Timeline(work, events, max(free), busy)


def bubble_formula(
    schedule: str,
    pipeline: int,
    virtual: int,
    microbatches: int,
    *,
    forward: float = 1.0,
    input_grad: float = 1.0,
    weight_grad: float = 1.0,
) -> float:
    """The bubble to expect of equal chunks without transfer time, from `pipeline` microbatches on.

    interleaved-zb needs weight gradients that cost no more than either other pass, zbv needs 2 pipeline - 1
    microbatches and three equal costs; there no rank waits once it began (2401.10241, section 6), and what is left
    is the last rank's wait for its first microbatch.
    """
    f, i, w = forward, input_grad, weight_grad
    rise = {"interleaved-zb": f + i - w, "zbv": f}.get(schedule, f + i + w)
    return (pipeline - 1) * rise / (virtual * microbatches * (f + i + w))
