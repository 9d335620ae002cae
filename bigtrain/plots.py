"""Pictures: the loss curve of one or several runs, the learning-rate range test. matplotlib is imported here
only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.errors import UserError
from bigtrain.metrics import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too (jfly.uni-koeln.de/color).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def loss_curve(runs: Sequence[str | Path], out: str | Path, *, title: str = "") -> Path:
    """Draw training loss, held-out loss and learning rate of runs over the tokens; returns the PNG's path.

    Raises UserError when no run has a step recorded.
    """
    found = [(Path(run).name, list(read_records(Path(run) / "metrics.jsonl"))) for run in runs]
    if not any(r["kind"] == "step" for _, records in found for r in records):
        raise UserError("no steps are recorded", where=", ".join(map(str, runs)), do="train first")
    figure = _figure(7.5, 5.6)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    unit, name = _token_unit(max(r["tokens"] for _, rs in found for r in rs if r["kind"] == "step"))
    shown: list[float] = []
    for i, (run, records) in enumerate(found):
        shown += _draw_run(
            top, below, records, unit, _COLOURS[i % len(_COLOURS)], run if len(found) > 1 else ""
        )
    _frame_losses(top, shown)
    top.set_title(
        title or (found[0][0] if len(found) == 1 else "Training runs"), loc="left", fontweight="bold"
    )
    top.set_ylabel("loss (nats per token)")
    top.legend(frameon=False, loc="upper right")
    below.set_ylabel("learning rate")
    below.set_xlabel(f"training tokens{name}")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    return _save(figure, out)


def _draw_run(
    top: Axes, below: Axes, records: list[dict[str, Any]], unit: float, colour: str, label: str
) -> list[float]:
    """One run's curves (`label` tells several apart); returns the losses that must be in sight."""
    steps = [r for r in records if r["kind"] == "step" and r["loss"] is not None]
    if not steps:
        return []
    tokens_at = {r["step"]: r["tokens"] / unit for r in steps}
    x, losses = list(tokens_at.values()), [r["loss"] for r in steps]
    tokens_at.setdefault(0, 0.0)  # a held-out point before the first step
    smooth = smoothed(losses, max(2, len(losses) // 100))
    prefix = f"{label}: " if label else ""
    top.plot(x, losses, color=colour, alpha=0.25, linewidth=0.8)
    top.plot(x, smooth, color=colour, linewidth=1.8, label=f"{prefix}training (smoothed; raw behind)")
    below.plot(x, [r["lr"] for r in steps], color=colour, linewidth=1.4)
    evals = [r for r in records if r["kind"] == "eval" and r["loss"] is not None and r["step"] in tokens_at]
    if not evals:
        return smooth
    values, last = [r["loss"] for r in evals], evals[-1]
    style: dict[str, Any] = {
        "color": colour if label else _COLOURS[1],
        "markerfacecolor": "white",
        "markersize": 5,
    }
    text = f"{prefix}held out, last {last['loss']:.3f} ({last['bits_per_byte']:.3f} bits per byte)"
    top.plot([tokens_at[r["step"]] for r in evals], values, "o-", linewidth=1.0, label=text, **style)
    return [*smooth, *values]


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and `reach` neighbours on both sides, fewer near the ends: it never lags behind."""
    total = [0.0, *itertools.accumulate(values)]
    last = len(values) - 1
    result: list[float] = []
    for i in range(len(values)):
        near = min(reach, i, last - i)
        result.append((total[i + near + 1] - total[i - near]) / (2 * near + 1))
    return result


def _frame_losses(axes: Axes, shown: list[float]) -> None:
    """Show all that matters: spikes of the raw curve may leave the picture, the smoothed one may not."""
    low, high = min(shown), max(shown)
    margin = 0.06 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + margin)


def lr_find_curve(lrs: Sequence[float], losses: Sequence[float], suggestion: float, out: str | Path) -> Path:
    """Draw a learning-rate range test and the rate it suggests; returns the PNG's path."""
    figure = _figure(7.5, 4.4)
    axes = figure.subplots()
    smooth = smoothed(losses, 3)
    axes.plot(lrs, losses, color=_COLOURS[0], alpha=0.25, linewidth=0.8)
    axes.plot(lrs, smooth, color=_COLOURS[0], linewidth=1.8, label="training loss (smoothed; raw behind)")
    axes.axvline(
        suggestion, color=_COLOURS[1], linewidth=1.4, label=f"start with optim.lr = {suggestion:.1e}"
    )
    axes.set_xscale("log")
    low, first = min(smooth), smooth[0]
    axes.set_ylim(low - 0.15 * (first - low + 1e-3), first + 0.6 * (first - low + 1e-3))
    axes.set_title("Learning-rate range test", loc="left", fontweight="bold")
    axes.set_xlabel("learning rate (rising every step)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, loc="upper left")
    return _save(figure, out)


def _token_unit(most: int) -> tuple[float, str]:
    """Unit of the token axis and its name."""
    for unit, name in (
        (1e12, " (trillions)"),
        (1e9, " (billions)"),
        (1e6, " (millions)"),
        (1e3, " (thousands)"),
    ):
        if most >= 2 * unit:
            return unit, name
    return 1.0, ""


def _figure(width: float, height: float) -> Figure:
    """An empty picture that needs no screen and leaves matplotlib's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, out: str | Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    return out
