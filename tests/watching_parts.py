"""Made-up run directories for the tests of `top` and `report`, written by the product's own writers."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigtrain.config import Config
from bigtrain.configfile import build
from bigtrain.metrics import EvalRecord, StepRecord
from bigtrain.rundir import RunDir, State
from bigtrain.sinks import JsonlSink

START = 1.7e9
"""When the made-up runs begin; a step takes two seconds, and an hour lies between attempts."""


def config(*overrides: str) -> Config:
    base = {
        "name": "demo",
        "model": {"vocab_size": 100, "layers": 2, "width": 32, "heads": 4},
        "data": {"path": "data/x", "sequence_length": 16},
        "train": {"steps": 60, "global_batch": 4},
    }
    return build(base, overrides)


def loss_at(step: int) -> float:
    return 2 + 3 / step


def record(step: int, **changed: Any) -> StepRecord:
    made = StepRecord(
        step=step, loss=loss_at(step), loss_z=0.5, grad_norm=1 + 1 / step, lr=1e-3 * min(1, step / 10),
        tokens=64 * step, samples=4 * step, epochs=step / 100, seconds=2.0, tokens_per_second=32.0,
        tokens_per_second_per_device=16.0, mfu=0.4, memory_bytes=3 * 2**30, skipped=False, loss_scale=1.0,
        time=START + 2 * step,
    )  # fmt: skip
    return replace(made, **changed)


def skipped(step: int) -> StepRecord:
    return record(step, loss=math.nan, grad_norm=math.inf, loss_z=None, skipped=True)


def evaluation(step: int) -> EvalRecord:
    loss = loss_at(max(step, 1)) + 0.1
    return EvalRecord(step, loss, math.exp(loss), loss / 3, 1000, START + 2 * step + 0.5)


def make_run(
    path: Path,
    first: int = 1,
    last: int = 60,
    *,
    settings: Collection[str] = (),
    end: State | None = "done",
    reason: str = "",
    skip: Collection[int] = (),
    evaluate_every: int = 10,
) -> Path:
    """One attempt at steps `first` to `last`; without an `end` it was killed. A former attempt in `path` is gone on."""
    run = RunDir.open(path, config(*settings), data="data hash")
    run.begin(first - 1)
    pause = 3600.0 * (run.attempt - 1)
    sink = JsonlSink(run.metrics)
    if first == 1 and evaluate_every:
        sink.write(evaluation(0))
    for step in range(first, last + 1):
        made = skipped(step) if step in skip else record(step)
        sink.write(replace(made, time=made.time + pause))
        if evaluate_every and step % evaluate_every == 0:
            tried = evaluation(step)
            sink.write(replace(tried, time=tried.time + pause))
    sink.close()
    if end is not None:
        run.finish(end, last, reason)
    run.close()
    _set_clock(path, START + pause + 2 * (first - 1) + 1, START + pause + 2 * last + 1)
    return path


def _set_clock(path: Path, started: float, ended: float) -> None:
    """Make the files say that the last attempt took place when its records say so, in a process that is gone."""
    provenance = json.loads((path / "provenance.json").read_text())
    attempt = provenance["attempts"][-1]
    attempt |= {"started": datetime.fromtimestamp(started, UTC).isoformat(), "pid": 2**22 + 1}
    (path / "provenance.json").write_text(json.dumps(provenance))
    if (path / "outcome.json").exists():
        outcome = json.loads((path / "outcome.json").read_text())
        (path / "outcome.json").write_text(json.dumps({**outcome, "time": ended}))


def rename(path: Path, name: str) -> None:
    """Give a run a name that no config may have; the file may be anybody's."""
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace('name = "demo"', f"name = {json.dumps(name)}", 1))


def write_log(path: Path, attempt: int, rank: int, *lines: str) -> None:
    """Append lines to a rank's log."""
    file = path / "logs" / f"{attempt:04d}" / f"rank_{rank}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.writelines(line + "\n" for line in lines)
