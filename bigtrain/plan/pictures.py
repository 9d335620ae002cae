"""Pictures of a plan: memory by stage and kind, the pipeline's timeline, speed over the number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import Config
from bigtrain.errors import UserError
from bigtrain.parallel.schedule import bubble_formula, orders, simulate
from bigtrain.parallel.split import chunk_costs
from bigtrain.plan.calibration import NEUTRAL, Calibration
from bigtrain.plan.estimate import Estimate
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.search import Layout, search, with_layout
from bigtrain.plan.telling import KINDS, stage_rows
from bigtrain.plots import _COLOURS, _figure, _save
from bigtrain.timeline import draw_timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, kinds that grow with the model first, what no tensor shows in grey.
_KIND_COLOURS = dict(
    zip(KINDS, ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#9A9A9A"), strict=True)
)
GIB = 2**30


def draw_all(e: Estimate, folder: Path) -> list[Path]:
    """memory.png, timeline.png (of a pipeline) and scaling.png in `folder`; their paths."""
    drawn = [draw_memory(e, folder / "memory.png")]
    if e.job.pipeline > 1:
        drawn.append(draw_pipeline(e, folder / "timeline.png"))
    return [*drawn, draw_scaling(e.config, e.cluster, folder / "scaling.png", e.calibration)]


def draw_memory(e: Estimate, out: Path) -> Path:
    """Stacked bars, one a pipeline stage (equal neighbours share one), against the card's memory."""
    rows = list(stage_rows(e.stages, e.memory))
    plain: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    figure = _figure(9.0, 1.9 + 0.42 * len(rows))
    axes = figure.subplots()
    for row, (_, stage, total) in enumerate(rows):
        left = 0.0
        for kind in KINDS:
            width = getattr(stage, kind) / GIB
            axes.barh(
                row,
                width,
                left=left,
                height=0.66,
                color=_KIND_COLOURS[kind],
                label=kind if row == 0 else None,
            )
            left += width
        reach = [[(total.point - total.low) / GIB], [(total.high - total.point) / GIB]]
        axes.errorbar(total.point / GIB, row, xerr=reach, color="#303030", capsize=3, linewidth=1.2)
        axes.text(
            total.high / GIB,
            row,
            f"  {total.point / GIB:.1f} GiB",
            va="center",
            fontsize=9,
            bbox=plain,
            zorder=3,
        )
    card = e.capacity / GIB
    axes.axvline(
        card, color="#B00020", linewidth=1.6, linestyle="--", label=f"{e.cluster.gpu.name}: {card:.0f} GiB"
    )
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1.14 * max(card, *(t.high / GIB for _, _, t in rows)))
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("GiB a rank (whisker: interval)")
    axes.set_title(
        f"{e.config.name} on {e.cluster.gpus:,} x {e.cluster.gpu.name}: memory", loc="left", fontweight="bold"
    )
    below: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 9, "ncols": 4}
    figure.legend(**below)
    return _save(figure, out)


def draw_pipeline(e: Estimate, out: Path) -> Path:
    """One step of the pipeline on the clock, with so few microbatches that the boxes can be read."""
    job = e.job
    config = with_layout(e.config, job)
    count = min(job.microbatches, (4 if job.chunks == 1 else 2) * job.pipeline)
    costs = chunk_costs(config)
    mean = sum(costs) / len(costs)
    # A microbatch's forward pass through an average chunk, by the step time's compute; both gradients cost twice that.
    forward = e.time.compute / job.microbatches / 3 / job.chunks * 1000
    each = [forward * cost / mean for cost in costs]
    timeline = simulate(orders(job.schedule, job.pipeline, job.chunks, count), each, each, each)
    whole = timeline.bubble
    if count < job.microbatches:
        whole = bubble_formula(job.schedule, job.pipeline, job.chunks, job.microbatches)
    title = f"{e.config.name}: {job.schedule}, {job.pipeline} stages"
    title += f" of {job.chunks} chunks" if job.chunks > 1 else ""
    shown = "" if count == job.microbatches else f" drawn with {count}, a step has"
    title += f";{shown} {job.microbatches} microbatches, bubble {whole:.1%}"
    return draw_timeline(timeline, out, title, time="ms (computing only)")


@dataclass(frozen=True)
class Point:
    """A number of GPUs and the fastest layout on it."""

    gpus: int
    layout: Layout

    @property
    def speed(self) -> float:
        """Tokens/s of all GPUs."""
        return self.layout.job.tokens_per_step / self.layout.time.total


def scaling(
    config: Config, cluster: Cluster, *, weak: bool, calibration: Calibration = NEUTRAL
) -> list[Point]:
    """The fastest layout on each doubling from a 16th of the GPUs to 16 times as many, where one fits.

    `weak`: the global batch grows with the GPUs (it is the config's on all of `cluster`), else it stays.
    """
    points = []
    unit = cluster.gpus & -cluster.gpus
    for i in range(-4, 5):
        if i < 0 and unit < 2**-i:
            continue
        gpus = cluster.gpus * 2**i if i >= 0 else cluster.gpus // 2**-i
        changed = _batch_times(config, gpus, cluster.gpus) if weak else config
        if changed is None:
            continue
        try:
            more = replace(cluster, gpus=gpus)
            found = search(changed, more, calibration=calibration, few=1, quick=True)
        except UserError:  # the batch does not divide among so many
            continue
        if found.best:
            points.append(Point(gpus, found.best[0]))
    return points


def _batch_times(config: Config, gpus: int, base: int) -> Config | None:
    """The config with its global batch times gpus / base; None where that is no whole number."""
    name = "global_batch" if config.train.global_batch is not None else "global_batch_tokens"
    value = getattr(config.train, name)
    least = base * (config.data.sequence_length if name == "global_batch_tokens" else 1)
    if value * gpus % least:
        return None
    update = {name: value * gpus // base, "batch_ramp_from": None, "batch_ramp_steps": None}
    return config.model_copy(update={"train": config.train.model_copy(update=update)})


def draw_scaling(config: Config, cluster: Cluster, out: Path, calibration: Calibration = NEUTRAL) -> Path:
    """Speed and MFU over the number of GPUs, the fastest layout at each, with a fixed and a growing batch."""
    figure = _figure(7.5, 6.0)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    strong, weak = (scaling(config, cluster, weak=w, calibration=calibration) for w in (False, True))
    tokens = (strong or weak)[0].layout.job.tokens_per_step if strong or weak else 0
    curves = (
        (strong, _COLOURS[0], f"the batch stays ({tokens / 1e6:.3g}M tokens)", "o-"),
        (weak, _COLOURS[1], "the batch grows with the GPUs", "s--"),
    )
    counts = sorted({p.gpus for p in (*strong, *weak)})
    if not counts:
        raise UserError("no number of GPUs has a layout that fits", where="--pictures", do="see `would fit`")
    for points, colour, label, line in curves:
        _draw_curve(top, below, points, colour, label, line)
    here = min(weak or strong, key=lambda p: abs(p.gpus - cluster.gpus))
    ideal = [here.speed / here.gpus * n for n in counts]
    top.plot(counts, ideal, color="#808080", linewidth=1.0, linestyle=":", label="in proportion", zorder=1)
    for axes in (top, below):
        axes.axvline(cluster.gpus, color="#C8C8C8", linewidth=5, zorder=0)
        axes.set_xscale("log", base=2)
    top.set_yscale("log")
    top.set_ylabel("tokens/s, all GPUs")
    top.legend(frameon=False, loc="upper left")
    top.set_title(
        f"{config.name} on {cluster.gpu.name}: fastest layout of each size", loc="left", fontweight="bold"
    )
    below.set_ylabel("MFU (%)")
    times = [p.layout.time for p in (*strong, *weak)]
    below.set_ylim(0, max(10.0, *(103 * t.mfu * t.total / t.low for t in times)))
    below.set_xticks(counts, [f"{n:,}" for n in counts])
    below.minorticks_off()
    below.set_xlabel(f"GPUs (grey: the {cluster.gpus:,} of this plan)")
    return _save(figure, out)


def _draw_curve(top: Axes, below: Axes, points: Sequence[Point], colour: str, label: str, line: str) -> None:
    """One curve in both panels, its interval as a band."""
    x = [p.gpus for p in points]
    top.plot(x, [p.speed for p in points], line, color=colour, label=label, markersize=5)
    times = [p.layout.time for p in points]
    low = [p.speed * t.total / t.high for p, t in zip(points, times, strict=True)]
    high = [p.speed * t.total / t.low for p, t in zip(points, times, strict=True)]
    top.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    below.plot(x, [100 * t.mfu for t in times], line, color=colour, markersize=5)
    low, high = (
        [100 * t.mfu * t.total / bound for t, bound in zip(times, bounds, strict=True)]
        for bounds in ([t.high for t in times], [t.low for t in times])
    )
    below.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
