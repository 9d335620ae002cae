"""Own time is measured without the others' waits, and who is slow again and again is named once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from bigtrain.grid import Grid
from bigtrain.heartbeat import Pulse
from bigtrain.stragglers import EVERY, TIMES, OwnTime, Stragglers


class Slow(nn.Module):
    """Takes a while."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x


def test_own_time_is_data_and_layers_in_some_steps() -> None:
    pulse = Pulse()
    clock = OwnTime(pulse, torch.device("cpu"))
    layers = [Slow(), Slow()]
    clock.follow(layers)
    before = pulse.count
    for step in range(1, EVERY + 2):
        clock.begin(step)
        time.sleep(0.01)  # data
        clock.has_data()
        for layer in layers:
            layer(torch.zeros(1))
        time.sleep(0.03)  # others
        clock.end()
        assert (pulse.own is None) == (step < EVERY)
    assert pulse.count - before == 2 * (EVERY + 1), "each layer's forward pass is progress"
    assert pulse.own is not None
    step, own, took = pulse.own
    assert step == EVERY
    assert 0.05 <= own < took - 0.025, "without the time that others took"


def beats(step: int, own: dict[int, float], took: float = 1.0) -> dict[int, Any]:
    return {rank: {"own": (step, seconds, took), "host": f"h{rank // 2}"} for rank, seconds in own.items()}


def test_named_after_several_comparisons_once_until_fast_again() -> None:
    found = Stragglers(Grid(data=4))
    slow, fast = {0: 0.5, 1: 0.5, 2: 0.9, 3: 0.51}, dict.fromkeys(range(4), 0.5)
    for i in range(TIMES - 1):
        found.compare(beats(i, slow))
    assert found.news() == []
    found.compare(beats(TIMES, slow))
    (named,) = found.news()
    assert (named.ranks, named.host, named.step) == ((2,), "h1", TIMES)
    assert named.ratio == pytest.approx(0.9 / 0.5)
    assert str(named) == (
        "rank 2 on h1 is slow: its own work in a step takes 1.80 x the median (900 ms, others 500 ms), 3 times in a row"
    )
    for i in range(10):
        found.compare(beats(10 + i, slow))
    assert found.news() == []
    found.compare(beats(30, fast))
    for i in range(TIMES):
        found.compare(beats(40 + i, slow))
    assert len(found.news()) == 1


def test_the_same_measurement_counts_once() -> None:
    found = Stragglers(Grid(data=2))
    for _ in range(5 * TIMES):
        found.compare(beats(10, {0: 0.5, 1: 0.9}))
    assert found.news() == []


def test_what_would_not_be_felt_is_not_named() -> None:
    found = Stragglers(Grid(data=2))
    for i in range(2 * TIMES):
        found.compare(beats(i, {0: 0.01, 1: 0.02}, took=1.0))
    assert found.news() == []


def test_stages_are_compared_with_their_own_kind() -> None:
    found = Stragglers(Grid(pipeline=2, data=2))
    for i in range(2 * TIMES):
        found.compare(beats(i, {0: 0.1, 1: 0.1, 2: 0.9, 3: 0.9}))
    assert found.news() == []
    for i in range(TIMES):
        found.compare(beats(100 + i, {0: 0.1, 1: 0.4, 2: 0.9, 3: 0.9}))
    assert [n.ranks for n in found.news()] == [(1,)]


def test_a_slow_host_is_told_in_one_line() -> None:
    found = Stragglers(Grid(data=6))
    for i in range(TIMES):
        found.compare(beats(i, {0: 0.5, 1: 0.5, 2: 0.9, 3: 0.8, 4: 0.5, 5: 0.5}))
    (named,) = found.news()
    assert named.ranks == (2, 3)
    assert str(named).startswith("ranks 2-3 on h1 are slow: their own work")
