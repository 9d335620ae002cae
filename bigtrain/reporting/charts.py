"""What is drawn, the same for the page and the pictures: charts, their lines, frames and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bigtrain.plots import smoothed
from bigtrain.reporting.thin import Curve
from bigtrain.reporting.watched import Watched

By = Literal["step", "tokens", "hours"]
BY_NAMES: dict[By, str] = {"step": "step", "tokens": "training tokens", "hours": "hours of training"}

# Told apart by colour-blind readers (after Okabe and Ito, jfly.uni-koeln.de/color) and at least 3:1 against the page,
# which their yellow and sky blue are not on white: one palette for light pages and one for dark ones.
LIGHT = ("#0072b2", "#c84e00", "#00795b", "#a8488a", "#7d6200", "#4b5a66", "#000000")
DARK = ("#56b4e9", "#ff9248", "#2cc99a", "#ec9fd0", "#e6c34a", "#a9b8c4", "#ffffff")


@dataclass(frozen=True)
class Panel:
    """A quantity with a chart of its own."""

    key: str
    title: str
    unit: str
    scale: float = 1.0
    smooth: bool = False
    from_zero: bool = True
    may_be_log: bool = False


PANELS = (
    Panel("loss", "Loss", "nats per token", smooth=True, from_zero=False),
    Panel("lr", "Learning rate", ""),
    Panel("grad_norm", "Gradient norm", "before clipping", smooth=True, may_be_log=True),
    Panel("tokens_per_second", "Throughput", "tokens/s, all devices", smooth=True),
    Panel("mfu", "Model FLOPs utilisation", "%", 100.0, smooth=True),
    Panel("memory_bytes", "Memory", "GiB, rank 0", 2.0**-30),
)


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    run: int
    """Which run it is of, from 0."""
    curve: Curve
    smooth: list[float]
    """The means over a few neighbours; the means themselves where nothing is smoothed."""
    held_out: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the abscissa."""

    x: float
    kind: Literal["resume", "skip"]
    run: int


@dataclass(frozen=True)
class Chart:
    """A quantity of all runs, with the frame that shows it."""

    panel: Panel
    by: By
    lines: list[Line]
    marks: list[Mark]
    x_max: float
    low: float
    high: float
    log: bool

    def across(self, x: float) -> float:
        """Place from left (0) to right (1)."""
        return x / self.x_max

    def up(self, y: float) -> float:
        """Place from bottom (0) to top (1), beyond for what the frame cuts off."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            return (math.log10(y) - low) / (high - low) if y > 0 else -1.0
        return (y - self.low) / (self.high - self.low)


def abscissa(runs: Sequence[Watched]) -> By:
    """Steps; tokens when the runs' steps differ in tokens, for then equal steps are not equal progress."""
    each = set()
    for run in runs:
        if run.history.step and (tokens := run.history.last.get("tokens")):
            each.add(round(tokens / run.history.step, 3))
    return "step" if len(each) < 2 else "tokens"


def charts_of(runs: Sequence[Watched], by: By, names: Sequence[str]) -> list[Chart]:
    """The charts that have something to show."""
    return [chart for panel in PANELS if (chart := _chart(panel, runs, by, names)) is not None]


def _chart(panel: Panel, runs: Sequence[Watched], by: By, names: Sequence[str]) -> Chart | None:
    lines: list[Line] = []
    x_max = max((float(run.history.steps.curve(by).high.max(initial=0.0)) for run in runs), default=0.0)
    for i, run in enumerate(runs):
        prefix = f"{names[i]}: " if len(runs) > 1 else ""
        word = "training" if panel.key == "loss" else panel.title.lower() if not prefix else ""
        lines += _line(
            run.history.steps.curve(panel.key, by), panel, i, (prefix + word).removesuffix(": "), x_max
        )
        if panel.key == "loss":
            curve = run.history.held_out.curve("loss", by)
            if len(curve.x):
                lines.append(Line(f"{prefix}held out", i, curve, curve.mean.tolist(), held_out=True))
    if not lines or x_max <= 0:
        return None
    marks = [mark for i, run in enumerate(runs) for mark in _marks(run, by, i)] if panel.key == "loss" else []
    return Chart(panel, by, lines, marks, x_max, *_frame(panel, lines))


def _line(curve: Curve, panel: Panel, run: int, label: str, x_max: float) -> list[Line]:
    if not len(curve.x):
        return []
    s = panel.scale
    scaled = Curve(curve.x, curve.mean * s, curve.low * s, curve.high * s, curve.bucket)
    means = scaled.mean.tolist()
    # A hundredth of the chart to both sides, so that a short run is as smooth as a long one beside it.
    points = x_max * (len(means) - 1) / max(float(curve.x[-1] - curve.x[0]), 1e-300)
    smooth = smoothed(means, max(2, round(min(0.01 * points, len(means))))) if panel.smooth else means
    return [Line(label, run, scaled, smooth)]


def _frame(panel: Panel, lines: Sequence[Line]) -> tuple[float, float, bool]:
    """Lowest and highest value shown, and whether the scale is logarithmic.

    What is smoothed may be cut off where it is raw: the highest and lowest fiftieth of the points may leave the frame,
    the smooth curve may not.
    """
    shown = [value for line in lines for value in line.smooth]
    low = min(*shown, *(float(np.quantile(line.curve.low, 0.02)) for line in lines))
    high = max(*shown, *(float(np.quantile(line.curve.high, 0.98)) for line in lines))
    if panel.may_be_log and low > 0 and high / low > 30:
        return 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9), True
    if panel.from_zero and low >= 0:
        return 0.0, 1.08 * high if high > 0 else 1.0, False
    margin = 0.06 * max(high - low, 1e-3 * max(abs(high), 1e-3))
    return low - margin, high + margin, False


def _marks(run: Watched, by: By, i: int) -> list[Mark]:
    """Where attempts went on, the last steps that were skipped (at most 200), and rollbacks."""
    history = run.history
    skips = list(history.skips)[-200:] + [h.step for h in history.happenings if h.name == "rollback"]
    resumes = [first - 1 for attempt, first in history.began.items() if attempt > 1]
    return [
        *(Mark(_place(run, step, by), "resume", i) for step in resumes),
        *(Mark(_place(run, step, by), "skip", i) for step in skips),
    ]


def _place(run: Watched, step: int, by: By) -> float:
    """A step's place on the abscissa, between the points of the curves."""
    curve = run.history.steps.curve(by)  # the abscissa's column over steps
    if by == "step" or not len(curve.x):
        return float(step)
    return float(np.interp(step, [0.0, *curve.x], [0.0, *curve.mean]))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], at most `most` of them."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [i * step for i in range(first, last + 1)]
    return [low, high]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], every second or third where they are many."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**i for i in range(first, last + 1, max(1, (last - first) // 6 + 1))]


def labels(values: Sequence[float]) -> list[str]:
    """Numbers for an axis, in one unit: 0, 5k, 10k and not 0, 5000, 10k."""
    largest = max(map(abs, values), default=0.0)
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= (10 * unit if letter == "k" else unit):
            return ["0" if value == 0 else f"{value / unit:.4g}{letter}" for value in values]
    if 1e-3 <= largest < 1:
        return ["0" if value == 0 else f"{value:.{_decimals(values)}f}" for value in values]
    return [compact(value) for value in values]


def _decimals(values: Sequence[float]) -> int:
    """As many as the finest of the values needs."""
    return max(len(f"{value:.10f}".rstrip("0").partition(".")[2]) for value in values)


def compact(value: float) -> str:
    """A number alone: 0.25, 1500, 20k, 1.2M, 4e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}"
