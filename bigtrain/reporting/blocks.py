"""Curves drawn with characters: one line, or a picture of several."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:-=+*#@"


def resampled(values: Sequence[float], width: int) -> list[float]:
    """The values as `width` columns: the mean of those that fall into each, or the nearest where there are fewer."""
    n = len(values)
    columns: list[float] = []
    for i in range(width if n else 0):
        part = values[i * n // width : max((i + 1) * n // width, i * n // width + 1)]
        columns.append(sum(part) / len(part))
    return columns


def blocks(
    values: Sequence[float],
    width: int,
    height: int = 1,
    *,
    plain: bool = False,
    frame: tuple[float, float] | None = None,
) -> list[str]:
    """`height` lines of `width` characters, the values from the first on the left to the last on the right.

    The lowest value is one eighth of a line, so that a flat curve is seen; of a single line the upper eighth stays
    free, so that lines under each other are told apart. `plain`: ASCII only. `frame`: lowest and highest value to
    show; beyond is cut off. Values must be finite.
    """
    columns = resampled(values, width)
    if not columns:
        return [" " * width] * height
    low, high = frame or (min(columns), max(columns))
    eighths = []
    for value in columns:
        share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.0
        eighths.append(1 + round(share * (8 * height - (1 if height > 1 else 2))))
    signs = _ASCII if plain else _BLOCKS
    return [
        "".join(signs[min(8, max(0, tall - 8 * floor))] for tall in eighths)
        for floor in range(height - 1, -1, -1)
    ]


def sensible_frame(values: Sequence[float]) -> tuple[float, float]:
    """Lowest value, and highest without the first of a steep fall: the twentieth part of the curve that is highest.

    A loss falls from 11 to 4 in the first hundredth of a run; in a picture of eight lines the rest would be one line.
    """
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)))]
    return ordered[0], high
