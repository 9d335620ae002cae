"""Runs side by side: their final figures, and the settings in which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from bigtrain.console import duration, short
from bigtrain.reporting.charts import Chart
from bigtrain.reporting.watched import Watched


def figures(run: Watched) -> dict[str, str]:
    """The figures that a run is judged by, name -> text; those that it does not have are left out."""
    history = run.history
    best, last = history.best(), history.evaluations[-1] if history.evaluations else None
    loss, speed, mfu = history.final_loss(), history.typical("tokens_per_second"), history.typical("mfu")
    memory = history.steps.curve("memory_bytes")
    total = run.total_steps()
    found = {
        "steps": f"{history.step:,}" + (f" of {total:,}" if total else ""),
        "tokens": _if(history.last.get("tokens"), short),
        "final training loss": _if(loss, "{:.4f}".format),
        "final held-out loss": _if(last and last.loss, "{:.4f}".format),
        "best held-out loss": "" if best is None else f"{best.loss:.4f} (step {best.step:,})",
        "bits per byte": _if(last and last.bits_per_byte, "{:.4f}".format),
        "perplexity, held out": _if(last and last.perplexity, "{:,.4g}".format),
        "tokens/s, median": _if(speed, short),
        "MFU, median": _if(mfu, "{:.1%}".format),
        "memory, rank 0": f"{memory.high.max() / 2**30:.2f} GiB" if len(memory.x) else "",
        "time in steps": duration(history.steps.total("seconds")[1]) if history.step else "",
        "skipped steps": f"{history.skipped:,}",
        "attempts": f"{len(run.attempts):,}" if run.attempts else "",
    }
    return {name: text for name, text in found.items() if text}


def at_the_same_place(loss: Chart, runs: int) -> tuple[str, list[str]]:
    """The runs' mean training losses in the last twentieth before the shortest of them ends.

    Final losses of unequal runs say little. Returns the row's name and a text for each run.
    """
    lines = {line.run: line for line in loss.lines if not line.held_out}
    common = min(float(line.curve.x[-1]) for line in lines.values())
    found = ["-"] * runs
    for i, line in lines.items():
        near = (line.curve.x > 0.95 * common) & (line.curve.x <= common)
        if near.any():
            found[i] = f"{line.curve.mean[near].mean():.4f}"
    where = f"{common:.3g} hours" if loss.by == "hours" else f"{loss.by} {short(round(common))}"
    return f"training loss near {where}", found


def _if(value: Any, form: Any) -> str:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return form(value) if usable else ""


def differences(runs: Sequence[Watched]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: key, and its value in each; a default that is not written is "-"."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [(key, [shown(run.settings.get(key)) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def shown(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def layout(run: Watched) -> dict[str, str]:
    """How the work was laid over the ranks, as far as it is not the default."""
    s = run.settings
    attempt = run.attempts[-1] if run.attempts else {}
    world = attempt.get("world")
    axes = {axis: s.get(f"layout.{axis}", 1) for axis in ("pipeline", "context", "tensor")}
    found: dict[str, str] = {}
    if isinstance(world, int):
        found["ranks"] = f"{world:,}"
        others = math.prod(size for size in axes.values() if isinstance(size, int)) or 1
        found["data"] = f"{world // others:,}"
    found |= {axis: str(size) for axis, size in axes.items() if size != 1}
    for key in ("schedule", "chunks"):
        if axes["pipeline"] != 1 and f"layout.{key}" in s:
            found[f"pipeline {key}"] = shown(s[f"layout.{key}"])
    for key in ("engine", "zero", "recompute", "offload", "kernels"):
        if f"layout.{key}" in s:
            found[{"zero": "ZeRO level"}.get(key, key)] = shown(s[f"layout.{key}"])
    for key in ("precision", "global_batch", "global_batch_tokens", "microbatch"):
        if f"train.{key}" in s:
            found[key.replace("_", " ")] = shown(s[f"train.{key}"])
    if "data.sequence_length" in s:
        found["sequence length"] = shown(s["data.sequence_length"])
    return found
