"""What metrics.jsonl tells, read as it grows: curves, evaluations, skipped steps, events, where attempts took over."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigtrain.reporting.follow import Follower
from bigtrain.reporting.thin import Floats, Ints, Thinned

STEP_COLUMNS = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_bytes", "seconds", "epochs")
ABSCISSAE = ("step", "tokens", "hours")
"""What curves may be drawn over; hours are hours of training, without pauses between attempts."""
_EVAL_COLUMNS = ("loss", "bits_per_byte", "perplexity")
_RECENT = 64
_LARGEST_STEP = 2**53


class Evaluation(NamedTuple):
    """A held-out evaluation; a number that was not finite is None."""

    step: int
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    time: float | None


class Happening(NamedTuple):
    """What a run wrote down besides its numbers: a spike, a rollback, a straggler."""

    step: int
    name: str
    text: str
    time: float


class History:
    """A metrics file so far; `read` takes in what is new. Memory does not grow with the steps."""

    def __init__(self, path: Path, most: int = 512) -> None:
        """`most`: buckets of a curve (bigtrain.reporting.thin)."""
        self._follower = Follower(path)
        self._most = most
        self._start_over()

    def _start_over(self) -> None:
        self.steps = Thinned((*ABSCISSAE, *STEP_COLUMNS), self._most)
        self.held_out = Thinned((*ABSCISSAE, *_EVAL_COLUMNS), self._most)
        self.evaluations: list[Evaluation] = []
        self.last: dict[str, Any] = {}
        """The last step's record."""
        self.recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self.losses: deque[float] = deque(maxlen=128)
        """The last finite losses."""
        self.skipped = 0
        self.skips: deque[int] = deque(maxlen=1000)
        """The last steps that were skipped."""
        self.happenings: deque[Happening] = deque(maxlen=1000)
        """The last of them. Those of steps that came again happened all the same."""
        self.began: dict[int, int] = {}
        """Attempt (from 1) -> its first step, of those whose steps still count."""
        self.unreadable = 0
        """Lines that are no records."""
        self.repeated = 0
        """Steps that the file holds more than once; the last one counts."""
        self._hours = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.last.get("step", 0))

    def final_loss(self) -> float | None:
        """Mean of the last fiftieth of the run's losses, of at most 128; one batch's loss alone is noise."""
        count, _ = self.steps.total("loss")
        if not count:
            return None
        return statistics.fmean(list(self.losses)[-max(1, min(len(self.losses), count // 50)) :])

    def best(self) -> Evaluation | None:
        """The evaluation with the lowest held-out loss."""
        sound = [e for e in self.evaluations if e.loss is not None]
        return min(sound, key=lambda e: (e.loss, e.step), default=None)

    def typical(self, column: str) -> float | None:
        """Median over the curve's points, so that a pause, a save or a compilation does not count."""
        curve = self.steps.curve(column)
        return float(np.median(curve.mean)) if len(curve.mean) else None

    def read(self, starts: Sequence[float] = ()) -> bool:
        """Take in what was appended; returns whether there was anything.

        `starts` are the times at which attempts started (seconds since 1970), to tell whose step is whose.
        """
        changed = self._follower.rewound()
        if changed:
            self._start_over()
        for lines in self._follower.batches():
            changed = True
            records = [record for record in _parsed(lines) if _is_record(record)]
            self.unreadable += len(lines) - len(records)
            for kind, group in _groups(records, self.step):
                if kind == "step":
                    self._take_steps(group, starts)
                elif kind == "eval":
                    for record in group:
                        self._take_evaluation(record)
                elif kind == "event":
                    self.happenings.extend(found for r in group if (found := _happening(r)))
        return changed

    def _take_steps(self, records: list[dict[str, Any]], starts: Sequence[float]) -> None:
        """Take records of ascending steps."""
        steps: Ints = np.array([r["step"] for r in records], np.int64)
        if self.last and steps[0] <= self.step:
            self._cut(int(steps[0]) - 1)
        values = {name: _column(records, name) for name in (*STEP_COLUMNS, "tokens")}
        hours = self._hours + np.cumsum(np.nan_to_num(values["seconds"], posinf=0)) / 3600
        self.steps.extend(steps, {**values, "step": steps.astype(np.float64), "hours": hours})
        self._hours = float(hours[-1])
        self.losses.extend(values["loss"][np.isfinite(values["loss"])][-128:].tolist())
        skips = [r["step"] for r in records if r.get("skipped") is True]
        self.skipped += len(skips)
        self.skips.extend(skips)
        attempts = np.searchsorted(np.array(starts), _column(records, "time"), side="right")
        for i in np.flatnonzero(np.diff(attempts, prepend=-1)):
            self.began.setdefault(int(attempts[i]), int(steps[i]))
        self.recent.extend(records[-_RECENT:])
        self.last = records[-1]

    def _take_evaluation(self, record: dict[str, Any]) -> None:
        step = record["step"]
        while self.evaluations and self.evaluations[-1].step >= step:
            self.evaluations.pop()
            self.held_out.cut(max(step - 1, 0))
        numbers = {name: _column([record], name) for name in _EVAL_COLUMNS}
        tokens = np.array([_number(self.last.get("tokens")) if step else 0.0])
        at = {"step": np.array([float(step)]), "tokens": tokens, "hours": np.array([self._hours])}
        self.held_out.extend(np.array([step]), {**numbers, **at})
        found = {key: None if math.isnan(value[0]) else float(value[0]) for key, value in numbers.items()}
        time = _number(record.get("time"))
        self.evaluations.append(Evaluation(step=step, **found, time=None if math.isnan(time) else time))

    def _cut(self, step: int) -> None:
        """Steps after `step` come again."""
        self.repeated += self.step - step
        self.steps.cut(step)
        self.held_out.cut(step)
        self.evaluations = [e for e in self.evaluations if e.step <= step]
        kept = [s for s in self.skips if s <= step]
        self.skipped -= len(self.skips) - len(kept)
        self.skips = deque(kept, maxlen=self.skips.maxlen)
        self.began = {attempt: first for attempt, first in self.began.items() if first <= step}


def _happening(record: dict[str, Any]) -> Happening | None:
    """An event's record; None when it lacks its text or its time."""
    name, text, time = record.get("name"), record.get("text"), _number(record.get("time"))
    if not isinstance(name, str) or not isinstance(text, str) or math.isnan(time):
        return None
    return Happening(record["step"], name, text, time)


def _parsed(lines: list[bytes]) -> list[Any]:
    """The JSON values of lines; what is no JSON is left out."""
    try:  # all at once takes two thirds of the time of one by one
        values = json.loads(b"[" + b",".join(lines) + b"]")
        if len(values) == len(lines):
            return list(values)
    except (ValueError, RecursionError):
        pass
    values = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            values.append(json.loads(line))
    return values


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("step")) is int
        and 0 <= value["step"] < _LARGEST_STEP
        and isinstance(value.get("kind"), str)
    )


def _groups(records: list[dict[str, Any]], last: int) -> list[tuple[str, list[dict[str, Any]]]]:
    """Successive records of one kind, steps in ascending order, `last` being the one before."""
    groups: list[tuple[str, list[dict[str, Any]]]] = []
    for record in records:
        kind = record["kind"]
        back = kind == "step" and record["step"] <= last
        if not groups or groups[-1][0] != kind or back:
            groups.append((kind, []))
        groups[-1][1].append(record)
        if kind == "step":
            last = record["step"]
    return groups


def _column(records: list[dict[str, Any]], name: str) -> Floats:
    """One number a record; null, absent and what is no number become nan."""
    values = [r.get(name) for r in records]
    try:
        found = np.array(values, np.float64)  # None becomes nan
    except (ValueError, TypeError, OverflowError):
        found = np.zeros(0)
    if found.shape != (len(records),):
        found = np.array([_number(value) for value in values])
    return found


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan
