"""The report's charts as PNGs. matplotlib is loaded here only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from bigtrain.plots import _figure, _save
from bigtrain.reporting.charts import BY_NAMES, LIGHT, Chart, Line, compact, decades, labels, ticks


def draw(charts: Sequence[Chart], folder: Path, prefix: str, title: str) -> list[Path]:
    """Write one PNG a chart, folder/<prefix><quantity>.png, and one with all of them; returns their paths."""
    paths = []
    for chart in charts:
        figure = _figure(7.5, 4.4)
        _draw(figure.subplots(), chart, heading=f"{title}: {chart.panel.title.lower()}")
        paths.append(_save(figure, folder / f"{prefix}{chart.panel.key}.png"))
    if charts:
        columns = 2 if len(charts) > 1 else 1
        rows = -(-len(charts) // columns)
        figure = _figure(6.2 * columns, 3.4 * rows + 0.4)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, chart in zip(grid.flat, charts, strict=False):
            _draw(axes, chart, heading=chart.panel.title)
        for axes in grid.flat[len(charts) :]:
            axes.remove()
        figure.suptitle(title, fontweight="bold")
        paths.append(_save(figure, folder / f"{prefix}overview.png"))
    return paths


def _draw(axes: Axes, chart: Chart, heading: str) -> None:
    several = len({line.run for line in chart.lines}) > 1
    for line in chart.lines:
        _draw_line(axes, line, several)
    for mark in chart.marks:
        if mark.kind == "resume":
            axes.axvline(mark.x, color="#888888", linewidth=0.8, linestyle=":")
        else:
            axes.plot(
                [mark.x], [0.02], "v", color="#cc0000", markersize=5, transform=axes.get_xaxis_transform()
            )
    axes.set_xlim(0, chart.x_max * 1.01)
    axes.set_ylim(chart.low, chart.high)
    axes.set_yscale("log" if chart.log else "linear")
    marks = decades(chart.low, chart.high) if chart.log else ticks(chart.low, chart.high)
    axes.set_yticks(marks, [compact(y) for y in marks] if chart.log else labels(marks))
    axes.minorticks_off()
    across = ticks(0, chart.x_max, 7)
    axes.set_xticks(across, labels(across))
    # $ would start a formula: names are the users'.
    axes.set_title(heading.replace("$", r"\$"), loc="left", fontweight="bold", fontsize=11)
    axes.set_ylabel(chart.panel.unit)
    axes.set_xlabel(BY_NAMES[chart.by])
    if several or len(chart.lines) > 1:
        axes.legend(frameon=False, fontsize=9)


def _draw_line(axes: Axes, line: Line, several: bool) -> None:
    colour = LIGHT[line.run % len(LIGHT)]
    label = line.label.replace("$", r"\$")
    if line.held_out:
        colour = colour if several else LIGHT[1]
        style = "o--" if several else "o-"
        axes.plot(line.curve.x, line.curve.mean, style, color=colour, markerfacecolor="white", markersize=4,
                  linewidth=1.0, label=label)  # fmt: skip
        return
    if not several and (line.curve.high > line.curve.low).any():
        axes.fill_between(
            line.curve.x, line.curve.low, line.curve.high, color=colour, alpha=0.15, linewidth=0
        )
    if line.smooth != line.curve.mean.tolist():
        axes.plot(line.curve.x, line.curve.mean, color=colour, alpha=0.3, linewidth=0.8)
    style = ("-", "--", "-.", ":")[line.run // len(LIGHT) % 4]
    axes.plot(line.curve.x, line.smooth, style, color=colour, linewidth=1.7, label=label)
