"""What happened to a run, in order of time: attempts, ends, checkpoints, evaluations, spikes, stragglers, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bigtrain.reporting.logs import LOUD
from bigtrain.reporting.watched import Watched

Tone = Literal["plain", "good", "warn", "bad"]
Kind = Literal["attempt", "end", "checkpoint", "evaluation", "skip", "spike", "rollback", "straggler", "log"]
_TONES: dict[str, Tone] = {"done": "good", "preempted": "warn", "failed": "bad"}
_KINDS: dict[str, Kind] = {
    "not finite": "skip",
    "spike": "spike",
    "rollback": "rollback",
    "straggler": "straggler",
}
"""What the events of metrics.jsonl are (bigtrain.recorder)."""


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    time: float
    """Seconds since 1970."""
    kind: Kind
    text: str
    tone: Tone = "plain"
    step: int | None = None


def events_of(run: Watched) -> list[Event]:
    """Everything that the run's files still tell, oldest first.

    Checkpoints are those that are still there; log lines are the last ones of each rank (bigtrain.reporting.logs).
    """
    found = [*_attempts(run), *_log(run)]
    found += [
        Event(c.time, "checkpoint", f"checkpoint of step {c.step:,} saved", "good", c.step)
        for c in run.checkpoints
    ]
    for e in run.history.evaluations:
        if e.time is not None:
            loss = "not finite" if e.loss is None else f"{e.loss:.4f}"
            bits = "" if e.bits_per_byte is None else f" ({e.bits_per_byte:.4f} bits per byte)"
            found.append(Event(e.time, "evaluation", f"held-out loss {loss}{bits}", step=e.step))
    for h in run.history.happenings:
        found.append(Event(h.time, _KINDS.get(h.name, "log"), h.text, "warn", h.step))
    return sorted(found, key=lambda event: event.time)


def _attempts(run: Watched) -> list[Event]:
    """How each attempt began and, where that is known, ended."""
    found = []
    for i, (attempt, start) in enumerate(zip(run.attempts, run.starts(), strict=True)):
        number = i + 1
        first = run.history.began.get(number)
        began = "the run begins" if number == 1 else f"attempt {number} goes on"
        if number > 1 and first is not None:
            began = f"attempt {number} goes on after step {first - 1:,}"
        world = attempt.get("world")
        text = began + (f" with {world:,} rank{'s' * (world != 1)}" if isinstance(world, int) else "")
        changed = attempt.get("changed")
        if isinstance(changed, list) and changed:
            text += "; changed: " + "; ".join(map(str, changed))
        found.append(Event(start, "attempt", text, step=None if first is None else first - 1))
        last = number == len(run.attempts)
        ended = run.outcome if last else attempt.get("ended")
        if isinstance(ended, dict):
            found.append(_end(ended, start))
        elif not last and "ended" in attempt:
            later = run.starts()[i + 1]
            found.append(Event(later, "end", f"attempt {number} left no outcome: it was killed", "bad"))
    return found


def _end(outcome: Mapping[str, Any], start: float) -> Event:
    state, step, reason = outcome.get("state"), outcome.get("step"), outcome.get("reason")
    at = outcome.get("time")
    text = (
        str(state)
        + (f" after step {step:,}" if isinstance(step, int) else "")
        + (f": {reason}" if reason else "")
    )
    return Event(
        float(at) if isinstance(at, (int, float)) else start,
        "end",
        " ".join(text.split()),
        _TONES.get(str(state), "warn"),
        step if isinstance(step, int) else None,
    )


def _log(run: Watched) -> list[Event]:
    """Log lines that the other events do not tell."""
    found = []
    for line in run.log:
        who = f" (on {line.ranks:,} ranks)" if line.ranks > 1 else f" (rank {line.rank})" if line.rank else ""
        tone: Tone = "plain" if line.level not in LOUD else "warn" if line.level == "WARNING" else "bad"
        if not line.rank and line.ranks == 1 and _told_otherwise(line.text, run):
            continue
        found.append(Event(line.time, "log", line.text + who, tone))
    return found


def _told_otherwise(text: str, run: Watched) -> bool:
    """Whether a line of rank 0's log says what another file says, too."""
    told = [
        "attempt ",
        "done at step",
        "preempted at step",
        "failed after step",
        "changed since the last attempt",
    ]
    if run.checkpoints:
        told.append("saved ")
    if any(text == happening.text for happening in run.history.happenings):
        return True
    return text.startswith(tuple(told)) or "  held out  loss " in text
