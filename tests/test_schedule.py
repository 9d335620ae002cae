"""The pipeline schedules: equal to torch's, complete and free of deadlock everywhere, as fast as the papers say."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from typing import Any

import pytest
import torch.distributed.pipelining.schedules as theirs

from bigtrain.parallel.schedule import (
    SCHEDULES,
    Action,
    Message,
    Orders,
    bubble_formula,
    chunks_of_rank,
    messages,
    needed,
    orders,
    problems,
    produced,
    rounds,
    simulate,
)

TORCH = {
    "gpipe": theirs.ScheduleGPipe,
    "1f1b": theirs.Schedule1F1B,
    "interleaved": theirs.ScheduleInterleaved1F1B,
    "interleaved-zb": theirs.ScheduleInterleavedZeroBubble,
    "zbv": theirs.ScheduleZBVZeroBubble,
}


def virtuals(schedule: str) -> list[int]:
    """Chunks a rank to try."""
    return {"gpipe": [1], "1f1b": [1], "zbv": [2]}.get(schedule, [1, 2, 3])


class RecordingStage:
    """As much of torch's pipeline stage as its schedules touch; notes the passes instead of doing them."""

    submod = None
    has_backward = True

    def __init__(self, index: int, pipeline: int, stages: int) -> None:
        self.stage_index, self.group_rank = index, index % pipeline
        self.group_size, self.num_stages = pipeline, stages
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.order: list[Action] = []

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> None:
        self.order.append(Action("F", self.stage_index, microbatch))

    def backward_one_chunk(self, microbatch: int, **_: Any) -> None:
        self.order.append(Action("B", self.stage_index, microbatch))

    def no_messages(self, _: int) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages

    def perform_reduce_grad(self, _: int) -> None:
        pass


def order_of_torch(schedule: str, pipeline: int, virtual: int, microbatches: int) -> list[list[Action]]:
    """What torch would run. Raises ValueError where torch refuses."""
    total = pipeline * virtual
    if schedule in ("gpipe", "1f1b"):
        # Not their `pipeline_order`, which is for display: in 2.13 the last rank of its 1F1B skips microbatch 0.
        found = []
        for rank in range(pipeline):
            stage = RecordingStage(rank, pipeline, total)
            runner: Any = TORCH[schedule](stage, microbatches)  # type: ignore[arg-type]
            runner._initialize_stage = lambda *_: None
            runner._step_microbatches()
            found.append(stage.order)
        return found
    stages = [RecordingStage(chunk, pipeline, total) for chunk in range(0, total, pipeline)]
    made: Any = TORCH[schedule](stages, microbatches)  # type: ignore[arg-type]
    short = {theirs.FORWARD: "F", theirs.FULL_BACKWARD: "B", theirs.BACKWARD_INPUT: "I"}
    return [
        [Action(short.get(a.computation_type, "W"), a.stage_index, a.microbatch_index) for a in order if a]  # type: ignore[arg-type]
        for _, order in sorted(made.pipeline_order.items())
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_orders_equal_torchs(schedule: str) -> None:
    compared = 0
    for pipeline in (2, 3, 4, 5):
        for virtual in virtuals(schedule):
            for microbatches in range(1, 17):
                try:
                    expected = order_of_torch(schedule, pipeline, virtual, microbatches)
                except ValueError:
                    continue
                assert orders(schedule, pipeline, virtual, microbatches) == expected
                compared += 1
    assert compared >= 20


def test_torch_refuses_what_we_take() -> None:
    """Should torch learn these, the comparison above must include them."""
    for refused in [("1f1b", 4, 1, 3), ("interleaved", 4, 2, 9), ("interleaved-zb", 4, 2, 9)]:
        with pytest.raises(ValueError, match="microbatches"):
            order_of_torch(*refused)
        assert not problems(orders(*refused), chunks_of_rank(*refused[:3]), refused[3])


def test_chunks() -> None:
    assert chunks_of_rank("1f1b", 3, 1) == [(0,), (1,), (2,)]
    assert chunks_of_rank("interleaved", 2, 3) == [(0, 2, 4), (1, 3, 5)]
    assert chunks_of_rank("zbv", 3, 2) == [(0, 5), (1, 4), (2, 3)]


def test_rounds_are_as_even_as_possible() -> None:
    assert [list(r) for r in rounds(4, 9)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert [len(r) for r in rounds(4, 3)] == [3]
    assert [len(r) for r in rounds(8, 31)] == [11, 10, 10]


def run_through_queues(work: Orders) -> bool:
    """Whether all ranks finish when receives happen in the promised order, as an executor's would.

    A rank that waits for a message first takes all that stand before it in the channel.
    """
    promised = {pair: deque(sent) for pair, sent in messages(work).items()}
    channels: dict[tuple[int, int], deque[Message]] = {pair: deque() for pair in promised}
    holder = {a.chunk: rank for rank, order in enumerate(work) for a in order}
    received: list[set[Message]] = [set() for _ in work]
    position = [0] * len(work)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(work):
            while position[rank] < len(order):
                action = order[position[rank]]
                need = needed(action, len(holder))
                if need is not None:
                    before = need.chunk + (-1 if need.kind == "activation" else 1)
                    channel = (holder[before], rank)
                    while holder[before] != rank and need not in received[rank] and channels[channel]:
                        assert channels[channel][0] == promised[channel].popleft()
                        received[rank].add(channels[channel].popleft())
                    if need not in received[rank]:
                        break
                message = produced(action, len(holder))
                if message is not None and holder[message.chunk] != rank:
                    channels[rank, holder[message.chunk]].append(message)
                elif message is not None:
                    received[rank].add(message)
                position[rank] += 1
                moved = True
    assert not any(channels.values()) or position != [len(order) for order in work]
    return position == [len(order) for order in work]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_shape_runs_to_its_end(schedule: str) -> None:
    for pipeline in (2, 3, 4, 6):
        for virtual in virtuals(schedule):
            chunks = chunks_of_rank(schedule, pipeline, virtual)
            for microbatches in [*range(1, 14), 17, 23]:
                work = orders(schedule, pipeline, virtual, microbatches)
                assert not problems(work, chunks, microbatches), (pipeline, virtual, microbatches)
                assert run_through_queues(work), (pipeline, virtual, microbatches)
    big = orders(schedule, 16, virtuals(schedule)[-1], 65)
    assert not problems(big, chunks_of_rank(schedule, 16, virtuals(schedule)[-1]), 65)


def test_messages_go_to_the_neighbours_chunk() -> None:
    sent = messages(orders("interleaved", 2, 2, 2))
    to_1 = [Message("activation", c, m) for c in (1, 3) for m in (0, 1)]
    # Chunk 2 hands its gradient to chunk 1, on the same rank that its activation goes to.
    assert sent[0, 1] == [*to_1, Message("gradient", 1, 0), Message("gradient", 1, 1)]
    assert (Message("activation", 2, 0)) in sent[1, 0], "chunk 1's output goes round to rank 0"
    v = messages(orders("zbv", 2, 2, 3))
    assert {m.chunk for m in v[0, 1]} == {1, 2}, "chunks 1 and 2, the tip of the V, share a rank"


def test_planted_errors_are_found() -> None:
    chunks = chunks_of_rank("1f1b", 2, 1)

    def planted(change: Any) -> str:
        work = orders("1f1b", 2, 1, 4)
        assert not problems(work, chunks, 4)
        change(work)
        return "; ".join(problems(work, chunks, 4))

    def swap(order: list[Action], i: int, j: int) -> None:
        order[i], order[j] = order[j], order[i]

    def late_first(work: list[list[Action]]) -> None:
        swap(work[1], 0, 6)
        swap(work[1], 1, 7)

    def move(work: list[list[Action]]) -> None:
        work[1].append(work[0].pop())

    assert "microbatch 0 does BF, not FB" in planted(lambda work: swap(work[1], 0, 1))
    assert "microbatch 3 does F, not" in planted(lambda work: work[0].pop())
    assert "microbatch 1 does FFB" in planted(lambda work: work[1].insert(2, work[1][2]))
    assert "rank 1: chunk 0, microbatch 3 is not its work" in planted(move)
    # Each rank's own work is complete and in order, but rank 1 wants the last microbatch before the first.
    deadlock = planted(late_first)
    assert deadlock == "rank 0 waits for ever at B0.0; rank 1 waits for ever at F1.3"


def test_a_weight_gradient_before_its_input_gradient_is_found() -> None:
    work = orders("zbv", 2, 2, 4)
    at = work[1].index(Action("I", 2, 0))
    work[1][at], work[1][at + 1] = work[1][at + 1], work[1][at]
    assert problems(work, chunks_of_rank("zbv", 2, 2), 4) == [
        "rank 1: chunk 2, microbatch 0 does FWI, not FB or FIW"
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bubbles_are_those_of_the_papers(schedule: str) -> None:
    """Also with a number of microbatches that does not divide: even rounds leave no bubble between them."""
    f, i, w = (1.0, 1.0, 1.0) if schedule == "zbv" else (1.0, 1.3, 0.7)
    for pipeline in (2, 3, 4, 8):
        for virtual in virtuals(schedule):
            fills = 2 * pipeline - 1 if schedule == "zbv" else pipeline
            for microbatches in (fills, fills + 1, 2 * fills + 1, 21):
                timeline = simulate(orders(schedule, pipeline, virtual, microbatches), f, i, w)
                formula = bubble_formula(
                    schedule, pipeline, virtual, microbatches, forward=f, input_grad=i, weight_grad=w
                )
                assert timeline.bubble == pytest.approx(formula, rel=1e-9)
                if schedule in ("interleaved-zb", "zbv"):
                    assert timeline.bubble < bubble_formula("1f1b", pipeline, 1, microbatches)


def test_formulas_by_hand() -> None:
    assert bubble_formula("gpipe", 4, 1, 8) == bubble_formula("1f1b", 4, 1, 8) == 3 / 8
    assert bubble_formula("interleaved", 4, 2, 8) == 3 / 16
    assert bubble_formula("interleaved-zb", 4, 1, 8) == 3 / 24
    assert bubble_formula("zbv", 4, 2, 8) == 3 / 48


def test_no_rank_of_a_zero_bubble_v_ever_waits() -> None:
    timeline = simulate(orders("zbv", 4, 2, 8), 1, 1, 1)
    for rank in range(4):
        own = [e for e in timeline.events if e.rank == rank]
        assert own[-1].end - own[0].start == timeline.busy[rank] == 48


def test_most_in_flight() -> None:
    p, m = 4, 16
    assert simulate(orders("gpipe", p, 1, m), 1, 1, 1).in_flight() == [m] * p
    assert simulate(orders("1f1b", p, 1, m), 1, 1, 1).in_flight() == [p - r for r in range(p)]
    for v in (2, 3):
        expected = [2 * (p - r - 1) + (v - 1) * p + 1 for r in range(p)]
        assert simulate(orders("interleaved", p, v, m), 1, 1, 1).in_flight() == expected
    h1 = simulate(orders("interleaved-zb", p, 1, m), 1, 1, 1)
    assert h1.in_flight() == [p - r for r in range(p)]
    assert h1.in_flight(until="BW") == [p] * p, "ZB-H1 has the memory of 1F1B's first rank everywhere"
    v_shape = simulate(orders("zbv", p, 2, m), 1, 1, 1)
    assert v_shape.in_flight(until="BW") == [2 * p] * p, "p of the whole model's 2 p chunks"


def test_uneven_chunks_and_transfer_take_their_time() -> None:
    """By hand: two ranks, one microbatch; then a slow second rank that sets the pace."""
    one = simulate(orders("1f1b", 2, 1, 1), [1, 2], [3, 4], [5, 6], transfer=0.5)
    assert one.makespan == 1 + 0.5 + 2 + (4 + 6) + 0.5 + (3 + 5)
    assert [(e.rank, str(e.action), e.start) for e in one.events] == [
        (0, "F0.0", 0),
        (1, "F1.0", 1.5),
        (1, "B1.0", 3.5),
        (0, "B0.0", 14.0),
    ]
    slow = simulate(orders("1f1b", 2, 1, 6), [1, 2], [1, 2], [1, 2])
    assert slow.busy == [18, 36]
    assert slow.makespan == 1 + 36 + 2
    assert slow.bubble == pytest.approx(3 / 36)


def test_a_broken_schedule_is_not_timed() -> None:
    work: Any = [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
    with pytest.raises(AssertionError, match="runs to its end"):
        simulate(work, 1, 1, 1)


def test_schedules_need_no_torch() -> None:
    program = "import sys, bigtrain.parallel.schedule\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
