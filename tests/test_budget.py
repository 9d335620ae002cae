"""Batch sizes and sample numbers are pure functions of the step and the same for every layout."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.budget import BatchSchedule, Progress, batch_problem, rank_samples, sample_id, united
from tests.test_config import small


def test_units_sequences_and_tokens_agree() -> None:
    by_tokens = small(train={"global_batch": None, "global_batch_tokens": 128})
    assert BatchSchedule.of(by_tokens) == BatchSchedule.of(small()) == BatchSchedule(8, 8, 0)


@given(unit=st.integers(1, 4), start=st.integers(1, 5), more=st.integers(0, 6), ramp=st.integers(1, 20))
def test_ramp_rises_in_whole_units_from_start_to_full(unit: int, start: int, more: int, ramp: int) -> None:
    schedule = BatchSchedule(full=unit * (start + more), start=unit * start, ramp_steps=ramp)
    sizes = [schedule.size(s) for s in range(ramp + 3)]
    assert sizes[0] == schedule.start
    assert sizes[ramp:] == [schedule.full] * 3
    assert sizes == sorted(sizes)
    assert all(size % schedule.unit == 0 for size in sizes)


def test_token_budget_counts_the_ramp() -> None:
    config = small(
        train={"steps": None, "tokens": 1000, "batch_ramp_from": 2, "batch_ramp_steps": 3, "microbatch": 2}
    )
    schedule = BatchSchedule.of(config)
    total = schedule.total_steps(config, Progress())
    consumed = [16 * sum(schedule.size(s) for s in range(n)) for n in (total - 1, total)]
    assert consumed[0] < 1000 <= consumed[1]
    half = 16 * sum(schedule.size(s) for s in range(2))
    assert schedule.total_steps(config, Progress(step=2, samples=half // 16, tokens=half)) == total


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_any_data_size_reads_the_same_global_batches(data_size: int) -> None:
    schedule = BatchSchedule(full=16, start=8, ramp_steps=4)
    ranks = [
        list(rank_samples(schedule, Progress(), 7, microbatch=2, data_rank=r, data_size=data_size))
        for r in range(data_size)
    ]
    first = 0
    for step in range(7):
        samples = sorted(s for rank in ranks for micro in rank[step] for s in micro)
        assert samples == list(range(first, first + schedule.size(step)))
        first += schedule.size(step)
    resumed = list(
        rank_samples(
            schedule,
            Progress(step=3, samples=sum(schedule.size(s) for s in range(3))),
            7,
            microbatch=2,
            data_rank=0,
            data_size=data_size,
        )
    )
    assert resumed == ranks[0][3:]


def test_a_batch_that_does_not_divide_is_refused_with_one_that_fits() -> None:
    assert batch_problem(BatchSchedule(8, 8, 0), 2, 4) == ""
    assert "microbatch = 2 fits" in batch_problem(BatchSchedule(8, 8, 0), 3, 4)
    assert "multiple of 3" in batch_problem(BatchSchedule(8, 8, 0), 1, 3)
    assert "rising from 6" in batch_problem(BatchSchedule(8, 6, 10), 4, 1)


def test_samples_of_the_first_steps_are_the_sum_of_their_sizes() -> None:
    schedule = BatchSchedule(full=16, start=4, ramp_steps=7)
    for steps in (0, 1, 6, 7, 12):
        assert schedule.samples(steps) == sum(schedule.size(s) for s in range(steps))


@given(
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 8)), max_size=5), count=st.integers(1, 80)
)
def test_what_is_left_out_is_passed_over_and_nothing_else(ranges: list[tuple[int, int]], count: int) -> None:
    left_out = united((first, first + more) for first, more in ranges)
    gone = {n for first, more in ranges for n in range(first, first + more + 1)}
    assert {n for first, last in left_out for n in range(first, last + 1)} == gone
    assert all(b[0] > a[1] + 1 for a, b in itertools.pairwise(left_out)), "apart from each other, in order"
    kept = [n for n in range(count + len(gone)) if n not in gone][:count]
    assert [sample_id(n, left_out) for n in range(count)] == kept


def test_ranks_pass_over_what_is_left_out_and_a_resumed_run_too() -> None:
    schedule, left_out = BatchSchedule(8, 8, 0), [(3, 4), (17, 30)]
    plan = partial(rank_samples, schedule, microbatch=2, data_size=2, left_out=left_out)
    ranks = [list(plan(Progress(), 5, data_rank=r)) for r in range(2)]
    read = [sorted(n for rank in ranks for micro in rank[step] for n in micro) for step in range(5)]
    assert list(itertools.chain(*read)) == [n for n in range(56) if n not in {3, 4, *range(17, 31)}]
    assert list(plan(Progress(3, 24), 5, data_rank=1)) == ranks[1][3:]
