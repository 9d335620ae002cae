"""Amounts and budgets as people write them."""

from __future__ import annotations

import pytest

from bigtrain.errors import UserError
from bigtrain.plan.quantities import amount, budget, gibibytes, short, span


@pytest.mark.parametrize(
    ("text", "value"),
    [("2T", 2e12), ("15e12", 15e12), ("500B", 5e11), ("1.5 G", 1.5e9), ("1_000,000", 1e6), ("64k", 64e3)],
)
def test_amounts(text: str, value: float) -> None:
    assert amount(text, "--tokens") == value


@pytest.mark.parametrize("text", ["", "many", "-3B", "0", "1.2.3", "5Q", "1e999", "inf", "2 T tokens"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(UserError, match="no positive number") as caught:
        amount(text, "--tokens")
    assert "--tokens" in str(caught.value)
    assert "15T" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hours"),
    [("5000gpuh", 5000), ("5k GPU-hours", 5000), ("200gpudays", 4800), ("20000usd", 8000), ("$20k", 8000)],
)
def test_budgets(text: str, hours: float) -> None:
    assert budget(text).gpu_hours(price=2.5) == hours


def test_a_budget_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="'5000' has no unit"):
        budget("5000")
    with pytest.raises(UserError, match="no budget"):
        budget("5000 potatoes")
    with pytest.raises(UserError, match="no budget"):
        budget("0usd")
    with pytest.raises(UserError, match="price"):
        budget("20000usd").gpu_hours(None)


def test_printed() -> None:
    assert [short(n) for n in (999, 1500, 160e9, 15.6e12)] == ["999", "1.5k", "160B", "15.6T"]
    assert gibibytes(80 * 2**30) == "80 GiB"
    assert gibibytes(5 * 2**40) == "5 TiB"
    assert gibibytes(7 * 2**20) == "7 MiB"
    times = (0.0123, 4.31, 150, 9000, 3 * 86400, 800 * 86400)
    assert [span(t) for t in times] == ["12.3 ms", "4.31 s", "2.5 min", "2.5 h", "3 days", "2.19 years"]
