"""Young's interval against his formula, and against a simulated year."""

from __future__ import annotations

import math
import random

import pytest

from bigtrain.plan.interval import GPU_HOURS_PER_FAILURE, RESTART_SECONDS, SavePlan, save_plan


def test_llama_3_failures() -> None:
    """419 interruptions in 54 days on 16,384 GPUs: one in about three hours there."""
    assert pytest.approx(54 * 24 / 419) == GPU_HOURS_PER_FAILURE / 16384


def test_young() -> None:
    plan = save_plan(1e12, gpus=1024, nodes=128, asynchronous=False, store_gb_s=1.0)
    blocked = 1e12 / 128e9 + 1e12 / (1024 * 10e9)
    assert plan.blocked_seconds == pytest.approx(blocked)
    assert plan.every_seconds == pytest.approx(math.sqrt(2 * blocked * GPU_HOURS_PER_FAILURE / 1024 * 3600))


def test_background_writes_are_cheaper_but_never_overlap() -> None:
    waiting, background = (save_plan(5e12, 8, 1, asynchronous=a) for a in (False, True))
    assert background.goodput > waiting.goodput
    slow = save_plan(5e12, 4096, 1, store_gb_s=0.1)
    assert slow.every_seconds == slow.write_seconds


def simulated(plan: SavePlan, every: float, failures: int) -> float:
    """Share of the time that is progress when saving `every` seconds of it, with failures at random moments."""
    rng, wall, done = random.Random(1), 0.0, 0.0
    M = plan.failure_hours * 3600
    period = every + plan.blocked_seconds
    for _ in range(failures):
        alive = rng.expovariate(1 / M)
        # The newest save that was on the disk when it failed; what was done since is lost.
        done += max(0.0, (alive - plan.write_seconds) // period) * every
        wall += alive + RESTART_SECONDS
    return done / wall


def test_the_goodput_is_what_a_simulation_finds_and_the_interval_is_its_best() -> None:
    plan = save_plan(1e12, gpus=4096, nodes=512, asynchronous=False, store_gb_s=0.05)
    found = {factor: simulated(plan, plan.every_seconds * factor, 20_000) for factor in (0.25, 1.0, 4.0)}
    assert found[1.0] == pytest.approx(plan.goodput, abs=0.01)
    assert found[1.0] > max(found[0.25], found[4.0]) + 0.01
