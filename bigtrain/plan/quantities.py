"""Amounts as people write them: `2T` tokens, `500B`, `15e12`, `5000gpuh`, `20000usd`; and how they are printed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from bigtrain.errors import UserError

_POWERS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_UNITS: dict[str, tuple[Literal["gpuh", "usd"], float]] = {
    "gpuh": ("gpuh", 1.0),
    "gpuhours": ("gpuh", 1.0),
    "h": ("gpuh", 1.0),
    "gpud": ("gpuh", 24.0),
    "gpudays": ("gpuh", 24.0),
    "usd": ("usd", 1.0),
    "$": ("usd", 1.0),
}
_NUMBER = r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kKMGBT]?)"


def amount(text: str, where: str) -> float:
    """A positive number with k, M, B (or G), T after it: "1.5T" is 1.5e12. Raises UserError naming `where`."""
    found = re.fullmatch(_NUMBER, text.strip())
    value = _value(found) if found else 0.0
    if not (found and 0 < value < math.inf):
        raise UserError(
            f"{text!r} is no positive number",
            where=where,
            do="write it as 15e12, 15T, 500B, 300M or 1_000_000",
        )
    return value


def _value(found: re.Match[str]) -> float:
    return float(found[1].replace("_", "").replace(",", "")) * _POWERS[found[2]]


@dataclass(frozen=True)
class Budget:
    """What may be spent on one run."""

    value: float
    unit: Literal["gpuh", "usd"]

    def gpu_hours(self, price: float | None) -> float:
        """GPU-hours; money needs the `price` of one, in the same currency. Raises UserError without it."""
        if self.unit == "gpuh":
            return self.value
        if price is None:
            raise UserError(
                "a budget in money needs the price of a GPU-hour",
                where="--budget",
                do="add --price 2.5 (usd)",
            )
        return self.value / price

    def __str__(self) -> str:
        return f"{self.value:,.0f} {'GPU-hours' if self.unit == 'gpuh' else 'usd'}"


def budget(text: str) -> Budget:
    """ "5000gpuh", "200 gpudays", "20000usd", "$20k". Raises UserError."""
    trimmed = text.strip()
    if trimmed.startswith("$"):
        trimmed = trimmed[1:] + "usd"
    found = re.fullmatch(_NUMBER + r"\s*([A-Za-z$-]+)", trimmed)
    unit = _UNITS.get(found[3].lower().replace("-", "")) if found else None
    value = _value(found) if found else 0.0
    if not (found and unit and 0 < value < math.inf):
        missing = re.fullmatch(_NUMBER, trimmed)
        raise UserError(
            f"{text!r} has no unit" if missing else f"{text!r} is no budget",
            where="--budget",
            do="write GPU-hours as 5000gpuh or money as 20000usd (with --price, the price of a GPU-hour)",
        )
    return Budget(value * unit[1], unit[0])


def short(number: float) -> str:
    """Three digits and k, M, B, T: 160B, 15.6T."""
    for unit, power in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * power:
            return f"{number / power:.3g}{unit}"
    return f"{number:.3g}"


def gibibytes(count: float) -> str:
    """A size on a card or disk in MiB, GiB or TiB (2^20, 2^30, 2^40 bytes)."""
    if count < 2**29:
        return f"{count / 2**20:.3g} MiB"
    return f"{count / 2**40:.3g} TiB" if count >= 1000 * 2**30 else f"{count / 2**30:.3g} GiB"


def span(seconds: float) -> str:
    """A time as people say it: 850 ms, 12.3 s, 45 min, 6.2 h, 12.5 days, 1.4 years."""
    for unit, length in (("years", 365.25 * 86400), ("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 if unit in ("days", "h", "min") else 1) * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"
