"""Published rules, checked at points that the papers or tables give."""

from __future__ import annotations

import pytest

from bigtrain.plan.scaling import (
    CHINCHILLA,
    allocation,
    batch_sizes,
    chinchilla_tokens,
    kaplan_lr,
    learning_rates,
    peak_learning_rate,
    step_law_lr,
)
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


def test_the_refitted_law_at_chinchilla() -> None:
    """The refit's paper (arXiv 2404.10102) finds about 20 tokens a parameter at Chinchilla's compute, 5.76e23."""
    parameters, tokens = CHINCHILLA.best(5.76e23)
    assert 17 < tokens / parameters < 23
    assert 6 * parameters * tokens == pytest.approx(5.76e23)


@pytest.mark.parametrize("compute", [1e18, 1e21, 3e24])
def test_the_best_is_a_minimum(compute: float) -> None:
    best, tokens = CHINCHILLA.best(compute)
    loss = CHINCHILLA.loss(best, tokens)
    assert loss == CHINCHILLA.best_loss(compute)
    for factor in (0.9, 1.1):
        assert CHINCHILLA.loss(best * factor, tokens / factor) > loss
    assert CHINCHILLA.compute_for(loss) == pytest.approx(compute)
    assert CHINCHILLA.tokens_for(best) == pytest.approx(tokens)


def test_no_compute_reaches_the_floor() -> None:
    assert CHINCHILLA.compute_for(1.8172) == float("inf")


def test_price_of_training_on() -> None:
    """Llama 3 8B saw 15T tokens, far beyond the best for its compute; a best allocation costs nothing extra."""
    long = allocation(8_030_261_248, 15e12)
    assert long.best_parameters > 5 * long.parameters
    assert long.loss > long.best_loss
    assert CHINCHILLA.best_loss(long.compute * (1 - long.extra_compute)) == pytest.approx(long.loss)
    assert long.extrapolated
    even = allocation(400_000_000, CHINCHILLA.tokens_for(4e8))
    assert even.extra_compute == pytest.approx(0, abs=1e-9)
    assert not even.extrapolated


def test_rules_beside_each_other() -> None:
    rates = learning_rates(500_000_000, 10_000_000_000)
    # By hand: 1.79 (5e8)^-0.713 (1e10)^0.307; 0.3118 (3e19)^-0.125; 0.003239 - 0.0001395 ln 5e8.
    assert [r.value for r in rates] == pytest.approx([1.3197e-3, 1.1461e-3, 4.4480e-4], rel=1e-4)
    assert [r.extrapolated for r in rates] == [False, True, False]
    batches = batch_sizes(500_000_000, 10_000_000_000)
    assert [b.value for b in batches] == pytest.approx([297_460, 686_040], rel=1e-4)


def test_kaplans_rule_ends_at_zero() -> None:
    assert kaplan_lr(12_500_000_000) is None
    assert len(learning_rates(70_000_000_000, 10**12)) == 2
