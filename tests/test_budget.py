"""Batch sizes and sample numbers are pure functions of the step and the same for every layout."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.budget import BatchSchedule, Progress, batch_problem, rank_samples, sample_id, united
from bigtrain.config import Config
from tests.test_config import small


def test_units_sequences_and_tokens_agree() -> None:
    by_tokens = small(train={"global_batch": None, "global_batch_tokens": 128})
    assert BatchSchedule.of(by_tokens) == BatchSchedule.of(small()) == BatchSchedule(8, 8, 0, 16)


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
        assert schedule.ahead(Progress(), steps).samples == sum(schedule.size(s) for s in range(steps))


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


def staged(**train: object) -> Config:
    stages = {"long": {"sample": 64, "sequence_length": 32}, "short": {"sample": 128, "sequence_length": 8}}
    return small(data={"stages": stages}, train=train)


def walked(config: Config, steps: int) -> list[tuple[int, int, int]]:
    """(first sample, sequences, length) of the first steps, by the plain rule."""
    found, sample = [], 0
    for _ in range(steps):
        length = 16 if sample < 64 else 32 if sample < 128 else 8
        size = config.train.global_batch or (config.train.global_batch_tokens or 0) // length
        found.append((sample, size, length))
        sample += size
    return found


@pytest.mark.parametrize("batch", [{"global_batch": 8}, {"global_batch": None, "global_batch_tokens": 128}])
def test_lengths_that_change_while_the_run_goes_on(batch: dict[str, int | None]) -> None:
    config = staged(**batch)
    schedule, expected = BatchSchedule.of(config), walked(config, 40)
    assert [schedule.at(step, sample) for step, (sample, _, _) in enumerate(expected)] == [
        e[1:] for e in expected
    ]
    for steps in (0, 1, 8, 9, 25, 40):
        end = schedule.ahead(Progress(), steps)
        tokens = sum(size * length for _, size, length in expected[:steps])
        assert (end.step, end.samples, end.tokens) == (steps, sum(e[1] for e in expected[:steps]), tokens)
        by_tokens = config.model_copy(
            update={"train": config.train.model_copy(update={"steps": None, "tokens": max(tokens, 1)})}
        )
        assert schedule.total_steps(by_tokens, Progress()) == max(steps, 1)
        assert schedule.total_steps(by_tokens, schedule.ahead(Progress(), min(steps, 5))) == max(steps, 1)
    plan = list(rank_samples(schedule, Progress(), 40, microbatch=1, data_rank=0, data_size=1))
    assert [(step[0][0], len(step)) for step in plan] == [e[:2] for e in expected]
    assert schedule.length_problem(Progress(), 40) == ""
    assert schedule.unit == (8 if config.train.global_batch else 4)


def test_a_length_that_changes_inside_a_step_is_refused() -> None:
    schedule = BatchSchedule.of(staged(global_batch=24))
    assert "let the stage begin at sample 48 or 72" in schedule.length_problem(Progress(), 40)
    assert schedule.length_problem(Progress(), 2) == ""
    # one batch is left out before it: now it is aligned
    assert "inside step" in BatchSchedule.of(staged(global_batch=8)).length_problem(Progress(), 40, [(3, 6)])
    assert BatchSchedule.of(staged(global_batch=8)).length_problem(Progress(), 40, [(3, 10)]) == ""
    growing = BatchSchedule.of(staged(global_batch=8, batch_ramp_from=4, batch_ramp_steps=20))
    assert "while the batch still grows" in growing.length_problem(Progress(), 40)
