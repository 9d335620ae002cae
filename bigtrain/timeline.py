"""The picture of a pipeline's step: what every rank does when, drawn and as text (`inspect CONFIG --schedule`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import Config
from bigtrain.errors import UserError
from bigtrain.parallel.schedule import Event, Timeline, bubble_formula, orders, simulate
from bigtrain.plots import _figure, _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette again: kind -> colour and name.
_KINDS = {
    "F": ("#56B4E9", "forward"),
    "B": ("#E69F00", "backward"),
    "I": ("#009E73", "input gradient"),
    "W": ("#CC79A7", "weight gradient"),
}
_IDLE = "#E8E8E8"


def explain_schedule(
    config: Config, out: Path | None, *, microbatches: int, costs: Sequence[float] | None = None
) -> str:
    """Simulate one step of the config's pipeline, describe it, and draw it into `out` (a PNG).

    `microbatches` are those of one data-parallel rank in a step. `costs` are forward times of the chunks, relative
    to each other (default: equal); the gradients of inputs and of weights take as long each, the messages nothing.
    Raises UserError when the config has no pipeline.
    """
    layout = config.layout
    p, v, m = layout.pipeline, layout.chunks, microbatches
    if p == 1:
        raise UserError(
            "there is no pipeline to draw: one rank holds all layers",
            where="layout.pipeline",
            do="set layout.pipeline = 2 or more (with --set layout.pipeline=4 to try)",
        )
    costs = [1.0] * (p * v) if costs is None else costs
    assert len(costs) == p * v, "one cost a chunk"
    mean = sum(costs) / len(costs)
    forward = [cost / mean for cost in costs]
    timeline = simulate(orders(layout.schedule, p, v, m), forward, forward, forward)
    formula = bubble_formula(layout.schedule, p, v, m)
    fills = {"gpipe": 1, "1f1b": 1, "zbv": 2 * p - 1}.get(layout.schedule, p)
    expected = f"formula {formula:.1%}" + (f", from m = {fills} on" if m < fills else "")
    uneven = max(forward) > 1.001 * min(forward)
    if uneven:
        expected += ", with even chunks"
    title = f"{layout.schedule}: p = {p}, v = {v}, m = {m}; bubble {timeline.bubble:.1%} ({expected})"
    lines = [
        title,
        "p pipeline ranks, v chunks on each, m microbatches a step; bubble: time over that of the busiest rank's work",
        timeline_text(timeline),
        "most in flight (chunk x microbatch) until backward / until weight gradients, rank by rank:",
        "  " + _ranks(timeline.in_flight()) + " / " + _ranks(timeline.in_flight(until="BW")),
    ]
    if uneven:
        busiest = max(timeline.busy)
        lines += ["busy rank by rank:", "  " + " ".join(f"{b / busiest:.0%}" for b in timeline.busy)]
    if out is not None:
        unit = "time (1: forward pass of an average chunk)"
        lines.append(f"drawn in {draw_timeline(timeline, out, title, time=unit)}")
    return "\n".join(lines)


def _ranks(counts: Sequence[int]) -> str:
    return " ".join(map(str, counts))


def _nth_chunk(timeline: Timeline) -> dict[int, int]:
    """For each chunk: how many chunks of its rank come before it."""
    held = [sorted({action.chunk for action in order}) for order in timeline.work]
    return {chunk: i for chunks in held for i, chunk in enumerate(chunks)}


def timeline_text(timeline: Timeline, width: int = 100) -> str:
    """One line a rank, time to the right: F0 begins the forward pass of microbatch 0, dots are bubble.

    A rank's second, fourth, ... chunks are in small letters. Without room for numbers an action is its letter, once
    for every unit of time; a step of more units than `width` is squeezed, and loses some.
    """
    shortest = min(event.end - event.start for event in timeline.events)
    digits = len(str(max(event.action.microbatch for event in timeline.events)))
    room = int(shortest * width / timeline.makespan)
    scale = room / shortest if room else width / timeline.makespan
    numbers = room >= digits + 2
    columns = round(timeline.makespan * scale)
    rows = [["."] * columns for _ in timeline.work]
    nth = _nth_chunk(timeline)
    for event in timeline.events:
        letter = event.action.kind.lower() if nth[event.action.chunk] % 2 else event.action.kind
        start, end = round(event.start * scale), round(event.end * scale)
        text = f"{letter}{event.action.microbatch}" if numbers else letter * (end - start)
        rows[event.rank][start:end] = text.ljust(end - start)
    tag = len(str(len(rows) - 1))
    return "\n".join(f"rank {rank:{tag}d} |{''.join(row)}|" for rank, row in enumerate(rows))


def draw_timeline(timeline: Timeline, path: str | Path, title: str, *, time: str = "time") -> Path:
    """Draw a step, one row a pipeline rank; returns the PNG's path."""
    ranks = len(timeline.work)
    shortest = min(event.end - event.start for event in timeline.events)
    # Wide enough for numbers in the boxes, within what a screen shows at once.
    width = min(20.0, max(9.0, 2.0 + 0.17 * timeline.makespan / shortest))
    height = min(0.34, 8.0 / ranks)
    figure = _figure(width, 1.5 + height * ranks)
    axes = figure.subplots()
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(ranks - 0.5, -0.5)
    # What layout the constrained engine finds does not change with text of fixed size, so its inches are known.
    inch = (width - 2.0) / timeline.makespan
    nth = _nth_chunk(timeline)
    for rank in range(ranks):
        axes.broken_barh([(0, timeline.makespan)], (rank - 0.42, 0.84), color=_IDLE, linewidth=0, zorder=1)
        _draw_rank(axes, [e for e in timeline.events if e.rank == rank], nth, inch, height)
    kept = timeline.in_flight(until="BW")
    labels = [
        f"{busy / timeline.makespan:.0%} busy, {n} in flight"
        for busy, n in zip(timeline.busy, kept, strict=True)
    ]
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(ranks), labels)
    right.spines[:].set_visible(False)
    for side in (axes, right):
        side.tick_params(axis="y", length=0, labelsize=min(9.0, 60 * height))
    axes.set_xlabel(time)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    _draw_legend(axes, timeline, max(nth.values()) + 1)
    return _save(figure, path)


def _shade(kind: str, nth: int) -> tuple[float, float, float]:
    """The kind's colour, lighter for later chunks of a rank (never so light that it looks idle)."""
    base = [int(_KINDS[kind][0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    white = 1 - 0.62**nth
    r, g, b = (c + (1 - c) * min(white, 0.7) for c in base)
    return r, g, b


def _draw_rank(axes: Axes, events: Sequence[Event], nth: dict[int, int], inch: float, height: float) -> None:
    """One row: boxes, and the microbatch in each that is wide enough for it (`inch`: width of a unit of time)."""
    colours = [_shade(event.action.kind, nth[event.action.chunk]) for event in events]
    spans = [(event.start, event.end - event.start) for event in events]
    edge = min(0.6, 4 * inch * min(length for _, length in spans))
    row = (events[0].rank - 0.42, 0.84)
    axes.broken_barh(spans, row, facecolors=colours, edgecolors="white", linewidth=edge, zorder=2)
    # One size for boxes of one width, that of the longest number, so that numbers do not come and go in a row.
    digits = max(len(str(event.action.microbatch)) for event in events)
    for event in events:
        size = min(9.0, 48 * height, 72 * inch * (event.end - event.start) / (0.72 * digits))
        if size >= 4.5:
            style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": size, "zorder": 3}
            axes.text((event.start + event.end) / 2, event.rank, str(event.action.microbatch), **style)


def _draw_legend(axes: Axes, timeline: Timeline, chunks: int) -> None:
    """The kinds and chunks that occur, and the bubble."""
    from matplotlib.patches import Patch

    kinds = {event.action.kind for event in timeline.events}
    entries = [
        Patch(color=_shade(kind, nth), label=name + (f", chunk {nth + 1} of {chunks}" if chunks > 1 else ""))
        for kind, (_, name) in _KINDS.items()
        if kind in kinds
        for nth in range(chunks)
    ]
    # Legends are filled column by column: empty entries keep one kind a column.
    entries += [Patch(color=_IDLE, label="bubble (idle)"), *[Patch(color="none", label=" ")] * (chunks - 1)]
    below: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 9}
    axes.figure.legend(handles=entries, ncols=len(kinds) + 1, **below)
