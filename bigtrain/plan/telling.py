"""What the planner found, as text for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from bigtrain.plan.estimate import Estimate, Range
from bigtrain.plan.interval import GPU_HOURS_PER_FAILURE, HOST_COPY_GB_S, STORE_GB_S
from bigtrain.plan.memory import StageMemory
from bigtrain.plan.quantities import gibibytes, short, span
from bigtrain.plan.scaling import allocation, batch_sizes, learning_rates
from bigtrain.plan.search import Found, Layout, described, why_slower
from bigtrain.plan.steptime import PARTS

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "unseen")
"""Of memory, in the order in which they are shown."""


def _line(name: str, text: str) -> str:
    return f"{name:17s}{text}"


def tell(e: Estimate) -> str:
    """One screen about one job on one cluster."""
    lines = [
        *_job_lines(e),
        "",
        *_memory_lines(e),
        "",
        *_time_lines(e),
        "",
        *_run_lines(e),
        "",
        *_rule_lines(e),
    ]
    return "\n".join(lines)


def _job_lines(e: Estimate) -> Iterator[str]:
    c, job = e.cluster, e.job
    gpus = "1 GPU" if c.gpus == 1 else f"{c.gpus:,} GPUs"
    where = f"{gpus}: {c.gpu.name}"
    if c.nodes > 1:
        where += (
            f", {c.nodes:,} nodes of {c.per_node}, {c.network.name} ({c.network.gb_s:g} GB/s a node each way)"
        )
    yield _line("cluster", where)
    yield _line("model", f"{e.config.name}: {e.parameters:,} parameters ({e.inner:,} without embeddings)")
    yield _line("FLOPs a token", f"{_exact(e.flops.training)} in training, every query times every key;")
    yield _line("", f"{_exact(e.flops.training_visible)} counting only the keys that a query sees")
    yield _line("layout", described(job))
    batch = f"{job.global_batch:,} sequences of {job.sequence_length:,}, {short(job.tokens_per_step)} tokens;"
    yield _line(
        "a step", f"{batch} {job.microbatches:,} microbatch{'es' * (job.microbatches > 1)} a data rank"
    )
    if others := sorted({*e.config.data.lengths.values()} - {job.sequence_length}):
        yield _line(
            "", f"planned for the longest sequences; [data.stages] has also {', '.join(map(str, others))}"
        )


def _exact(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:,.1f}"


def _memory_lines(e: Estimate) -> Iterator[str]:
    """A table: pipeline stages that need the same share one line."""
    shown = [kind for kind in KINDS if any(getattr(s, kind) for s in e.stages)]
    yield _line("GiB a rank", "".join(f"{kind:>12}" for kind in shown) + "       total  (interval)")
    for name, stage, total in stage_rows(e.stages, e.memory):
        cells = "".join(f"{getattr(stage, kind) / 2**30:12.2f}" for kind in shown)
        row = f"{cells}{total.point / 2**30:12.2f}  ({total.low / 2**30:.1f} to {total.high / 2**30:.1f})"
        yield _line("  " + name, row)
    most = max(e.memory, key=lambda m: m.point)
    spare = e.capacity - most.point
    if e.surely_fits:
        verdict = f"fits: {gibibytes(spare)} of {gibibytes(e.capacity)} to spare"
    elif e.fits:
        verdict = (
            f"just fits: {gibibytes(spare)} of {gibibytes(e.capacity)} to spare, less than the uncertainty"
        )
    else:
        verdict = f"DOES NOT FIT: {gibibytes(-spare)} more than the {gibibytes(e.capacity)} of a {e.cluster.gpu.name}"
    yield _line("", verdict)


def stage_rows(
    stages: Sequence[StageMemory], totals: Sequence[Range]
) -> Iterator[tuple[str, StageMemory, Range]]:
    """(name, memory, total) of the pipeline's stages, neighbours that are equal to the MiB together."""
    if len(stages) == 1:
        yield "each rank", stages[0], totals[0]
        return
    cells = [tuple(round(getattr(s, kind) / 2**20) for kind in KINDS) for s in stages]
    for _, same in groupby(range(len(stages)), key=lambda i: cells[i]):
        numbers = list(same)
        first, last = numbers[0], numbers[-1]
        name = f"stage {first}" if first == last else f"stages {first}-{last}"
        yield name, stages[first], totals[first]


def _time_lines(e: Estimate) -> Iterator[str]:
    t = e.time
    by, c = "", e.correction
    if c.runs:
        whose = "of these shapes" if c.same_shape else "of other shapes"
        by = f", {c.time_factor:.3g} x the model's by {c.runs} run{'s'[: c.runs > 1]} {whose}"
    yield _line("step time", f"{_range(e.step, span)}{by}")
    parts = [part for part in PARTS if getattr(t, part) > 0.0005 * t.total]
    yield _line("", ", ".join(f"{part} {span(getattr(t, part))}" for part in parts))
    if {"tensor", "context", "data", "pipeline"} & set(parts):
        yield _line("", "(tensor, context, data, pipeline: communication that no computing hides)")
    yield _line("speed", f"{_range(e.speed, lambda s: f'{s:,.0f}')} tokens/s a GPU")
    mfu, visible, hfu = (_range(e.utilisation(kind), _percent) for kind in ("mfu", "visible", "hfu"))
    yield _line("MFU", f"{mfu}; {visible} counting only the keys seen; HFU {hfu}")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _range(r: Range, show: object) -> str:
    assert callable(show)
    return f"{show(r.point)} ({show(r.low)} to {show(r.high)})"


def _run_lines(e: Estimate) -> Iterator[str]:
    s = e.saves
    yield _line("the run", f"{short(e.tokens)} tokens, {e.steps:,} steps: {_range(e.wall, span)}")
    spent = f"{_range(e.gpu_hours, _count)} GPU-hours"
    if (cost := e.cost) is not None:
        spent += f", {_range(cost, _count)} at {e.price:g} an hour"
    yield _line("", spent)
    yield _line(
        "a checkpoint",
        f"{gibibytes(s.bytes)}; written in {span(s.write_seconds)}, training waits "
        f"{span(s.blocked_seconds)} (at {STORE_GB_S:g} GB/s a node, {HOST_COPY_GB_S:g} GB/s a GPU to its host)",
    )
    yield _line(
        "save every",
        f"{span(s.every_seconds)} by Young's formula: a failure every {span(s.failure_hours * 3600)}"
        f" (one in {GPU_HOURS_PER_FAILURE:,.0f}",
    )
    yield _line("", f"GPU-hours, Llama 3, arXiv 2407.21783); {_percent(s.goodput)} of the time is progress")


def _rule_lines(e: Estimate) -> Iterator[str]:
    """The newcomer's questions: how much data, which rate, which batch."""
    judged = allocation(e.parameters, e.tokens)
    note = " (extrapolated)" if judged.extrapolated else ""
    yield _line(
        "data",
        f"{e.tokens / e.parameters:.3g} tokens a parameter; for this compute the least loss has "
        f"{short(judged.best_parameters)} parameters and {short(judged.best_tokens)} tokens,",
    )
    gap = judged.loss - judged.best_loss
    if judged.extra_compute > 0.005:
        size = "smaller" if judged.parameters < judged.best_parameters else "larger"
        yield _line(
            "",
            f"{gap:.3f} nats less; the {size} model costs {judged.extra_compute:.0%} of the compute "
            f"(Chinchilla refitted, arXiv 2404.10102){note}",
        )
    else:
        yield _line("", f"as good as these (Chinchilla refitted, arXiv 2404.10102){note}")
    given = f"{e.config.optim.lr:.3g} in the config; " if e.config.optim.lr is not None else ""
    rates = [f"{r.value:.2g} {_source(r.source, r.extrapolated)}" for r in learning_rates(e.inner, e.tokens)]
    others = " (AdamW's)" if e.config.optim.kind == "sgd" else ""
    yield _line("learning rate", given + ", ".join(rates) + others)
    batches = [
        f"{short(b.value)} {_source(b.source, b.extrapolated)}" for b in batch_sizes(e.inner, e.tokens)
    ]
    yield _line("batch, tokens", f"{short(e.job.tokens_per_step)} in the config; " + ", ".join(batches))
    if any(r.extrapolated for r in learning_rates(e.inner, e.tokens)):
        yield _line("", "*: outside the sizes that the rule was fitted on")


def _source(source: str, extrapolated: bool) -> str:
    return source.split(",")[0] + ("*" if extrapolated else "")


def tell_search(found: Found) -> str:
    """The best layouts, why each loses against the first, and what would not fit."""
    lines = []
    for i, layout in enumerate(found.best):
        lines.append(_line("layouts" if i == 0 else "", f"{i + 1}. {_layout(layout)}"))
        if i:
            lines.append(_line("", f"   {why_slower(layout.time, found.best[0].time)}"))
    for i, layout in enumerate(found.too_large):
        over = gibibytes(layout.bytes - found.capacity)
        lines.append(_line("too large" if i == 0 else "", f"- {_layout(layout)}: {over} too much"))
    if found.offload and found.best:
        lines.append(_line("", "nothing fits unless the optimizer state is kept in host memory"))
    lines.append(_line("", f"{found.tried:,} layouts compared in {found.seconds:.1f} s"))
    return "\n".join(lines)


def _layout(layout: Layout) -> str:
    return f"{span(layout.time.total)}, {gibibytes(layout.bytes)}: {described(layout.job)}"
