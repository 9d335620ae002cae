"""Published rules, checked at points that the papers or tables give."""

from __future__ import annotations

import pytest

from bigtrain.plan.scaling import chinchilla_tokens, peak_learning_rate, step_law_lr
from tests.test_config import small


def test_step_law_inside_and_outside_its_range() -> None:
    # 1.79 * (1e9)^-0.713 * (1e11)^0.307, by hand.
    inside = step_law_lr(1_000_000_000, 100_000_000_000)
    assert inside.value == pytest.approx(1.63e-3, rel=0.01)
    assert not inside.extrapolated
    assert step_law_lr(8_000_000_000, 15_000_000_000_000).extrapolated


def test_a_given_rate_wins_over_the_law() -> None:
    assert peak_learning_rate(small(optim={"lr": 2e-3}), 1000).value == 2e-3
    assert "Step Law" in peak_learning_rate(small(), 1000).source


def test_about_twenty_tokens_a_parameter() -> None:
    assert chinchilla_tokens(70_000_000_000).value == pytest.approx(1.4e12)
