"""A chart as HTML: an SVG that stretches to any width, and its labels beside it as text that does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from bigtrain.reporting.charts import BY_NAMES, LIGHT, Chart, Line, Mark, compact, decades, labels, ticks

_SIDE = 1000
"""Units of the SVG in both directions; the browser stretches them, strokes keep their width."""


def figure(chart: Chart, number: int) -> str:
    """The whole figure. `number` is the chart's place in the data that the script reads."""
    panel, several = chart.panel, len({line.run for line in chart.lines}) > 1
    unit = f' <span class="unit">{escape(panel.unit)}</span>' if panel.unit else ""
    wide = " wide" if panel.key == "loss" else ""
    return (
        f'<figure class="chart{wide}" id="{panel.key}">\n'
        f"<figcaption><h2>{escape(panel.title)}</h2>{unit}{' <span class=unit>log scale</span>' * chart.log}"
        f"{_legend(chart, several)}</figcaption>\n"
        f'<div class="plot" tabindex="0" role="img" data-chart="{number}" aria-label="{escape(_described(chart))}">\n'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" aria-hidden="true">\n'
        f"{_grid(chart)}{''.join(_line(chart, line, several) for line in chart.lines)}{_marks(chart)}</svg>\n"
        f"{_labels(chart)}</div>\n</figure>\n"
    )


def _described(chart: Chart) -> str:
    """For those who do not see it."""
    parts = [
        f"{line.label or chart.panel.title}: from {compact(line.smooth[0])} to {compact(line.smooth[-1])}"
        for line in chart.lines
    ]
    return f"{chart.panel.title} over {BY_NAMES[chart.by]}. " + "; ".join(parts)


def colour(line: Line, several: bool) -> int:
    """Which of the page's colours: one for each run; of a single run, another for held-out values."""
    return line.run % len(LIGHT) if several or not line.held_out else 1


def dash(run: int) -> str:
    """Runs beyond the palette are told apart by dashes."""
    return ("", " d1", " d2", " d3")[run // len(LIGHT) % 4]


def _legend(chart: Chart, several: bool) -> str:
    entries = []
    if len(chart.lines) > 1:
        for line in chart.lines:
            held = " held" if line.held_out else ""
            key = f"k{colour(line, several)}{held}{dash(line.run)}"
            entries.append(f'<li><span class="key {key}"></span>{escape(line.label)}</li>')
    kinds = {mark.kind for mark in chart.marks}
    if "resume" in kinds:
        entries.append('<li><span class="key resume"></span>resumed</li>')
    if "skip" in kinds:
        entries.append('<li><span class="key skip"></span>step skipped</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>' if entries else ""


def _x(chart: Chart, x: float) -> int:
    return round(_SIDE * chart.across(x))


def _y(chart: Chart, y: float) -> int:
    """From the top; what is far outside the frame stays near it, so that no number is huge."""
    return round(_SIDE * (1 - min(3.0, max(-2.0, chart.up(y)))))


def _path(points: Iterable[tuple[int, int]]) -> str:
    """A path through points, those on top of the one before left out."""
    found: list[tuple[int, int]] = []
    for point in points:
        if not found or point != found[-1]:
            found.append(point)
    if len(found) == 1:
        return f"M{found[0][0]} {found[0][1]}h0"
    return "M" + "L".join(f"{x} {y}" for x, y in found)


def _line(chart: Chart, line: Line, several: bool) -> str:
    curve, c = line.curve, f"c{colour(line, several)}"
    xs = [_x(chart, x) for x in curve.x.tolist()]
    means = list(zip(xs, (_y(chart, y) for y in curve.mean.tolist()), strict=True))
    if line.held_out:
        dots = "".join(f"M{x} {y}h0" for x, y in means)
        return f'<path class="held {c}" d="{_path(means)}"/><path class="dots {c}" d="{dots}"/>\n'
    parts = []
    if not several and (curve.high > curve.low).any():
        top = list(zip(xs, (_y(chart, y) for y in curve.high.tolist()), strict=True))
        bottom = list(zip(xs, (_y(chart, y) for y in curve.low.tolist()), strict=True))
        parts.append(f'<path class="band {c}" d="{_path([*top, *reversed(bottom)])}Z"/>')
    smooth = list(zip(xs, (_y(chart, y) for y in line.smooth), strict=True))
    if smooth != means:
        parts.append(f'<path class="raw {c}" d="{_path(means)}"/>')
    parts.append(f'<path class="smooth {c}{dash(line.run)}" d="{_path(smooth)}"/>')
    return "".join(parts) + "\n"


def _y_ticks(chart: Chart) -> list[float]:
    found = decades(chart.low, chart.high) if chart.log else ticks(chart.low, chart.high)
    return [y for y in found if -0.001 <= chart.up(y) <= 1.001]


def _x_ticks(chart: Chart) -> list[float]:
    found = ticks(0.0, chart.x_max, 7)
    return [x for x in found if chart.by != "step" or x == math.floor(x)]


def _grid(chart: Chart) -> str:
    across = "".join(f"M0 {_y(chart, y)}H{_SIDE}" for y in _y_ticks(chart))
    up = "".join(f"M{_x(chart, x)} 0V{_SIDE}" for x in _x_ticks(chart))
    return f'<path class="grid" d="{across}{up}"/>\n'


def _marks(chart: Chart) -> str:
    resumes = "".join(f"M{_x(chart, m.x)} 0V{_SIDE}" for m in _distinct(chart, "resume"))
    skips = "".join(f"M{_x(chart, m.x)} {_SIDE}v-40" for m in _distinct(chart, "skip"))
    return (f'<path class="resume" d="{resumes}"/>' if resumes else "") + (
        f'<path class="skip" d="{skips}"/>' if skips else ""
    )


def _distinct(chart: Chart, kind: str) -> Sequence[Mark]:
    return list({_x(chart, m.x): m for m in chart.marks if m.kind == kind}.values())


def _labels(chart: Chart) -> str:
    """Ticks as text, in per cent of the plot, and the abscissa's name."""
    up, across = _y_ticks(chart), _x_ticks(chart)
    named = [compact(y) for y in up] if chart.log else labels(up)
    ys = "".join(
        f'<span class="y" style="bottom:{100 * chart.up(y):.2f}%">{text}</span>'
        for y, text in zip(up, named, strict=True)
    )
    xs = "".join(
        f'<span class="x{" odd" * (i % 2)}" style="left:{100 * chart.across(x):.2f}%">{text}</span>'
        for i, (x, text) in enumerate(zip(across, labels(across), strict=True))
    )
    return f'{ys}{xs}<span class="by">{escape(BY_NAMES[chart.by])}</span>\n'
