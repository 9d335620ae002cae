"""The guard sees planted spikes, no others, and decides the same after a resume."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from bigtrain.budget import Progress
from bigtrain.engine.protocol import StepResult
from bigtrain.errors import RunError
from bigtrain.guard import Finding, Guard, missing, robust_z
from tests.test_config import small

BATCH, LENGTH = 8, 16


def guard_of(max_skipped: int = 10, **policy: Any) -> Guard:
    return Guard(small(guard=policy, train={"max_skipped": max_skipped}))


class Curve:
    """A noisy curve that falls, and what an engine would make of its steps."""

    def __init__(self, guard: Guard, seed: int = 1) -> None:
        self.guard, self.dice, self.progress = guard, random.Random(seed), Progress()

    def step(self, loss_factor: float = 1.0, norm_factor: float = 1.0) -> Finding | None:
        """One step; its loss and norm times these factors."""
        s = self.progress.step
        noise = self.dice.gauss(0, 0.05), self.dice.gauss(0, 0.25)
        loss = (2.5 + 4 * math.exp(-s / 150) + noise[0]) * loss_factor
        norm = (0.6 + math.exp(-s / 100)) * math.exp(noise[1]) * norm_factor
        overflow = not math.isfinite(loss * norm)
        skipped = overflow or self.guard.refuses(loss, norm)
        result = StepResult(loss, math.inf if overflow else norm, skipped, 1.0)
        after = Progress(s + 1, (s + 1) * BATCH, (s + 1) * BATCH * LENGTH)
        before, self.progress = self.progress, after
        return self.guard.look(before, after, result)

    def steps(self, count: int) -> list[Finding]:
        """Ordinary steps; what was found."""
        return [found for _ in range(count) if (found := self.step()) is not None]


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_falling_curve_raises_no_alarm(seed: int) -> None:
    assert Curve(guard_of(), seed).steps(1500) == []


@pytest.mark.parametrize(("loss", "norm"), [(1.5, 1.0), (1.0, 20.0)])
def test_a_spike_of_either_is_found_and_the_step_named(loss: float, norm: float) -> None:
    curve = Curve(guard_of())
    curve.steps(300)
    found = curve.step(loss, norm)
    assert found is not None
    assert (found.what, found.action, found.step) == ("spike", "warn", 301)
    assert (found.first_sample, found.last_sample) == (2400, 2407)
    assert found.loss_z is not None
    assert found.norm_z is not None
    assert (found.loss_z > 8) == (loss > 1)
    assert (found.norm_z > 8) == (norm > 1)
    assert curve.steps(100) == []


def test_a_fall_is_no_spike() -> None:
    curve = Curve(guard_of())
    curve.steps(300)
    assert curve.step(0.5, 0.01) is None


def test_the_first_spike_does_not_hide_the_next_one() -> None:
    """Five huge steps that were made all the same leave the median and its deviation where they were."""
    curve = Curve(guard_of())
    curve.steps(300)
    assert [curve.step(4.0, 50.0) is not None for _ in range(5)] == [True] * 5
    assert curve.step(1.5) is not None


def test_nothing_is_a_spike_before_half_of_the_window_is_full() -> None:
    curve = Curve(guard_of(window=32))
    curve.steps(15)
    assert curve.step(9.0, 90.0) is None
    curve.steps(1)
    assert curve.step(9.0, 90.0) is not None


def test_a_curve_without_noise_raises_no_alarm_at_a_ripple() -> None:
    assert robust_z(2.51, [2.5] * 128, 0.005 * 2.5) < 8 < robust_z(2.7, [2.5] * 128, 0.005 * 2.5)
    assert robust_z(0.0, [0.0] * 10, 0.0) == 0.0


def test_what_was_left_out_does_not_enter_the_window() -> None:
    """A whole window of refused steps: the next ordinary one is ordinary, the next spike a spike."""
    curve = Curve(guard_of(on_spike="skip", window=16, max_skipped=99))
    curve.steps(100)
    for _ in range(20):
        found = curve.step(3.0, 30.0)
        assert found is not None
        assert found.action == "skip"
    assert curve.step() is None
    assert curve.step(3.0) is not None


@pytest.mark.parametrize("policy", ["warn", "skip", "rollback"])
def test_what_is_not_finite_is_skipped_under_every_policy(policy: str) -> None:
    curve = Curve(guard_of(on_spike=policy, window=8))
    curve.steps(20)
    found = curve.step(math.nan)
    assert found is not None
    assert (found.what, found.action, found.loss_z) == ("not finite", "skip", None)
    assert (found.first_sample, found.last_sample) == (160, 167)
    assert "samples 160 to 167" in found.sentence()
    json.dumps(found.record(), allow_nan=False)
    assert found.record()["loss"] is None
    assert curve.steps(20) == []


def test_too_many_in_a_row_stop_the_run_and_name_all_their_samples() -> None:
    curve = Curve(guard_of(on_spike="skip", window=8, max_skipped=3))
    curve.steps(20)
    for factor in (math.nan, 3.0):
        found = curve.step(factor)
        assert found is not None
        curve.guard.check_row(found)
    curve.step()
    for factor in (math.inf, 3.0):
        found = curve.step(factor)
        assert found is not None
        curve.guard.check_row(found)
    found = curve.step(math.nan)
    assert found is not None
    with pytest.raises(RunError, match=r"3 steps in a row.*samples 184 to 207") as caught:
        curve.guard.check_row(found)
    assert caught.value.where == "step 26"


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_resumed_guard_goes_on_as_the_one_that_was_not_interrupted(policy: str) -> None:
    """Also in the middle of a row, and with steps that went before it."""
    curve = Curve(guard_of(on_spike=policy, window=32, leave_out=3, max_skipped=3))
    curve.steps(100)
    curve.step(math.nan)
    other = Curve(guard_of(on_spike=policy, window=32, leave_out=3, max_skipped=3))
    other.guard.load(json.loads(json.dumps(curve.guard.state())))
    other.dice.setstate(curve.dice.getstate())
    other.progress = curve.progress
    ahead = [1.0, 1.0, math.nan, 1.0, 1.4, math.nan, math.nan, 1.0]
    found = [str(curve.step(factor)) for factor in ahead]  # str: a nan differs from itself
    assert found == [str(other.step(factor)) for factor in ahead]
    assert found[4].startswith("Finding(what='spike'")
    assert curve.guard.state() == other.guard.state()


def test_a_checkpoint_of_an_older_version_is_an_empty_window() -> None:
    curve = Curve(guard_of(window=8))
    curve.steps(20)
    curve.guard.load({})
    assert curve.guard.state() == guard_of(window=8).state()


def test_a_rollback_leaves_out_the_samples_of_so_many_steps() -> None:
    curve = Curve(guard_of(on_spike="rollback", window=16, leave_out=3))
    curve.steps(20)
    state = json.loads(json.dumps(curve.guard.state()))
    curve.steps(10)
    found = curve.step(3.0, 30.0)
    assert found is not None
    assert found.action == "rollback"
    assert curve.guard.latest(found) == 28, "steps 29, 30 and 31 are left out"
    assert (found.first_sample, found.last_sample) == (28 * BATCH, 31 * BATCH - 1)
    alone = curve.guard.skipping(found, Progress(30, 30 * BATCH))
    assert (alone.action, alone.first_sample, alone.last_sample) == ("skip", 30 * BATCH, 31 * BATCH - 1)
    curve.guard.roll_back(found, state)
    assert curve.guard.left_out == [(224, 247)]
    assert curve.guard.state() == {**state, "rolled": curve.guard.state()["rolled"]}
    # The next spike lies behind what is left out already, in sample numbers.
    curve.progress = Progress(20, 20 * BATCH)
    curve.steps(15)
    found = curve.step(3.0, 30.0)
    assert found is not None
    assert (found.first_sample, found.last_sample) == (33 * BATCH + 24, 36 * BATCH + 24 - 1)


def test_more_rollbacks_than_allowed_stop_the_run() -> None:
    curve = Curve(guard_of(on_spike="rollback", window=16, max_rollbacks=1))
    curve.steps(20)
    state = curve.guard.state()
    found = curve.step(3.0, 30.0)
    assert found is not None
    curve.guard.roll_back(found, state)
    with pytest.raises(RunError, match=r"after 1 rollbacks.*160 to 167") as caught:
        curve.step(3.0, 30.0)
    assert "guard.max_rollbacks" in caught.value.do


def test_rollbacks_that_no_record_tells_of() -> None:
    found = Finding("spike", "rollback", 7, 48, 55, 9.0, 20.0, 3.0, 1.0)
    other = replace(found, step=9, first_sample=72, last_sample=79)
    told = {"kind": "event", "name": "rollback", "step": 5, "data": found.record()}
    records = [{"kind": "step", "step": 5}, told, {**told, "name": "spike", "data": other.record()}]
    assert missing([found, other], records) == [other]
