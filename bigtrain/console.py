"""What a person sees: one line a step on a log, a live line and bar on a terminal, one screen at the end."""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol, TextIO

from bigtrain.configfile import load
from bigtrain.metrics import EvalRecord, StepRecord, read_records

_log = logging.getLogger(__name__)

WIDTH = 120
"""No step line is longer: it fits side by side with an editor and into a SLURM log."""


class Device(Protocol):
    """torch.device, of which only the type matters here."""

    type: str


class Console:
    """Prints a run's progress. On a terminal a live line and bar, elsewhere plain lines and no control
    codes."""

    def __init__(
        self,
        *,
        total_steps: int,
        tokens_total: int,
        devices: int,
        device: Device,
        every_steps: int = 1,
        startup: Startup | None = None,
        stream: TextIO | None = None,
    ) -> None:
        """`tokens_total`: tokens consumed at the end of the run, for the time left."""
        self._stream = stream or sys.stdout
        self._total, self._every = total_steps, every_steps
        self._tokens_total = tokens_total
        self._devices, self._unit = devices, "gpu" if device.type == "cuda" else "proc"
        self._startup = startup
        self._speeds: deque[float] = deque(maxlen=50)
        live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live = _Live(total_steps, self._stream) if live else None
        self._marks = -1

    def say(self, text: str) -> None:
        """A line that stays, also in the log."""
        _log.info("%s", text)
        self._show(text)

    def _show(self, text: str) -> None:
        if self._live is not None:
            self._live.above(text)
        else:
            print(text, file=self._stream, flush=True)

    def step(self, record: StepRecord) -> None:
        """A step is done: a line every `every_steps`; on a terminal one that stays every twentieth of the
        run."""
        self._speeds.append(record.tokens_per_second)
        if self._startup is not None:
            self._startup.done("first step")
            self.say(self._startup.line())
            self._startup = None
        line = step_line(
            record,
            self._total,
            devices=self._devices,
            unit=self._unit,
            seconds_left=self._seconds_left(record),
        )
        if self._live is None:
            if record.step % self._every == 0 or record.step in (1, self._total):
                self._show(line)  # not in the log: metrics.jsonl holds every step
            return
        mark = record.step * 20 // max(self._total, 1)
        if mark != self._marks:
            self._marks = mark
            self._live.above(line)
        self._live.show(line, record.step)

    def evaluation(self, record: EvalRecord) -> None:
        """A held-out evaluation is done."""
        width = len(str(self._total))
        self.say(
            f"{record.step:>{width}}/{self._total}  held out  loss {record.loss:.4f}  "
            f"perplexity {record.perplexity:.2f}  bits per byte {record.bits_per_byte:.4f}"
        )

    def saved(self, path: Path, seconds: float, waited: float) -> None:
        """A checkpoint is committed: seconds from begin to end, and how long of it training stood still."""
        self.say(f"saved {path} in {seconds:.1f} s; training waited {waited:.2f} s")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.close()
            self._live = None

    def _seconds_left(self, record: StepRecord) -> float | None:
        """By the median speed of the last steps, so that one slow step (a save, a compile) does not count."""
        speed = statistics.median(self._speeds)
        return (self._tokens_total - record.tokens) / speed if speed > 0 else None


def step_line(
    record: StepRecord, total_steps: int, *, devices: int, unit: str, seconds_left: float | None
) -> str:
    """One step in at most WIDTH characters, the columns of successive steps under each other.

    Step, loss (deviations from the last steps' mean), gradient norm, learning rate, tokens/s in all and per
    `unit` (of several), MFU (where known), memory, share of the training split read, time left.
    """
    z = "" if record.loss_z is None else _fixed(record.loss_z, 4, "+") + "z"
    speed = f"{short(record.tokens_per_second):>5} tok/s"
    if devices > 1:
        speed += f" {short(record.tokens_per_second_per_device):>5}/{unit}"
    fields = [
        (0, f"{record.step:>{len(str(total_steps))}}/{total_steps}"),
        (0, f"loss {_fixed(record.loss, 6)} {z:5}"),
        (0, f"grad {_fixed(record.grad_norm, 6)}"),
        (0, f"lr {record.lr:.1e}"),
        (0, speed),
        (3, "" if record.mfu is None else f"mfu {100 * record.mfu:4.1f}%"),
        (1, f"{_fixed(record.memory_bytes / 2**30, 3)}G"),
        (2, f"data {_fixed(100 * record.epochs, 4)}%"),
        (4, "" if seconds_left is None else f"eta {duration(seconds_left)}"),
        (0, "SKIPPED" if record.skipped else ""),
    ]
    for dropped in range(5):  # the least needed first
        line = "  ".join(text for rank, text in fields if text and not 0 < rank <= dropped)
        if len(line) <= WIDTH:
            return line
    return line[:WIDTH]


def _fixed(value: float, width: int, sign: str = "") -> str:
    """`width` characters with as many digits as fit, at most width - 2 of them behind the point."""
    for digits in range(width - 2, 0, -1):
        text = f"{value:{sign}.{digits}f}"
        if len(text) <= width:
            break
    else:
        text = f"{value:{sign}.0f}"
    if len(text) > width and width >= 6 and math.isfinite(value):
        text = f"{value:{sign}.0e}"
    return f"{text:>{width}}"


def short(number: float) -> str:
    """Three digits: 987, 12.3k, 1.23M."""
    unit = ""
    for unit in ("", "k", "M", "G", "T"):
        if number < 999.5 or unit == "T":
            break
        number /= 1000
    digits = 0 if not unit or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """5s, 3m07s, 2h05m, 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Startup:
    """Where the time to the first step goes: `done` ends a phase."""

    def __init__(self, began: float | None = None) -> None:
        """The first phase began at `began` (seconds since 1970), by default with the process."""
        self._phases: list[tuple[str, float]] = []
        self._last = began or _process_start()

    def done(self, phase: str) -> None:
        """The time since the last call, or since the process started, was `phase`."""
        now = time.time()
        self._phases.append((phase, now - self._last))
        self._last = now

    def line(self) -> str:
        """All phases, in one line."""
        total = sum(seconds for _, seconds in self._phases)
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._phases)
        return f"start-up {total:.1f} s: {parts}"


def _process_start() -> float:
    """When this process began, in seconds since 1970; now, where /proc does not tell."""
    try:
        # Field 22 of /proc/self/stat, in clock ticks since boot; the name in field 2 may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return time.time()
    return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")


class _Live:
    """The last step and a bar at the bottom of a terminal, everything else scrolls above."""

    def __init__(self, total_steps: int, stream: TextIO) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        # Drawn by us at most ten times a second: a drawing thread would take the interpreter from training.
        self._live = Live(console=RichConsole(file=stream), auto_refresh=False, transient=True)
        self._live.start()
        self._total = total_steps
        self._drawn = 0.0

    def above(self, text: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(text), soft_wrap=True)

    def show(self, line: str, step: int) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        if time.monotonic() - self._drawn < 0.1 and step < self._total:
            return
        self._drawn = time.monotonic()
        bar = ProgressBar(total=self._total, completed=step)
        self._live.update(Group(Text(line, style="bold"), bar), refresh=True)

    def close(self) -> None:
        self._live.stop()


def summary(run: Path, command: str = "") -> str:
    """One screen about a run that ended: how, from which loss to which, how fast, where everything lies."""
    records = list(read_records(run / "metrics.jsonl"))
    steps = [r for r in records if r["kind"] == "step"]
    lines = [_ending(run, steps)]
    losses = [r["loss"] for r in steps if r["loss"] is not None]
    if losses:
        lines.append(f"training loss   {losses[0]:.4f} -> {losses[-1]:.4f} nats a token")
    lines += _held_out([r for r in records if r["kind"] == "eval" and r["loss"] is not None])
    if steps:
        speed = statistics.median(r["tokens_per_second"] for r in steps)
        mfus = [r["mfu"] for r in steps if r.get("mfu") is not None]
        busy = f", MFU {100 * statistics.median(mfus):.1f} %" if mfus else ""
        lines.append(f"speed           {speed:,.0f} tokens/s (median of all steps){busy}")
    lines.append(f"everything in   {run}")
    lines += _saved(run)
    lines += [f"{what:<15} {run / where}" for what, where in _PLACES if (run / where).exists()]
    if command:
        lines.append(f"go on with      {command}")
    return "\n".join(lines)


def _saved(run: Path) -> list[str]:
    """Which checkpoints there are; only where when that is not the run directory: a store may be out of reach."""
    resolved = run / "config.toml"
    if resolved.is_file() and (folder := load(resolved).checkpoint.folder):
        return [f"checkpoints     in {folder}"]
    saved = sorted(p.name for p in (run / "checkpoints").glob("step_*") if ".tmp" not in p.name)
    return [f"checkpoints     {', '.join(saved)}"] if saved else []


_PLACES = (
    ("metrics", "metrics.jsonl"),
    ("loss curve", "plots/loss.png"),
    ("samples", "samples"),
    ("TensorBoard", "tensorboard"),
)


def _ending(run: Path, steps: list[dict[str, Any]]) -> str:
    """The first line of the summary."""
    state, reason = "not finished", ""
    if (run / "outcome.json").exists():
        outcome = json.loads((run / "outcome.json").read_text())
        state, reason = outcome["state"], outcome["reason"]
    line = f"{state} ({reason})" if reason else str(state)
    if steps:
        spent = duration(sum(r["seconds"] for r in steps))
        line += f" at step {steps[-1]['step']:,}: {steps[-1]['tokens']:,} tokens in {spent} of training"
    return line


def _held_out(evaluations: list[dict[str, Any]]) -> list[str]:
    if not evaluations:
        return []
    first, last = evaluations[0], evaluations[-1]
    if first is last:
        return [
            f"held out        {last['bits_per_byte']:.4f} bits per byte, perplexity {last['perplexity']:,.2f}"
        ]
    return [
        f"held out        {first['bits_per_byte']:.4f} -> {last['bits_per_byte']:.4f} bits per byte, "
        f"perplexity {first['perplexity']:,.2f} -> {last['perplexity']:,.2f} "
        f"(step {first['step']:,} to {last['step']:,})"
    ]
