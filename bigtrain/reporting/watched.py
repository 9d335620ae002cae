"""A run directory, looked at again and again: how the run stands, and everything that its files say."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import statistics
import time
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bigtrain.budget import BatchSchedule, Progress
from bigtrain.configfile import load
from bigtrain.console import duration
from bigtrain.errors import UserError
from bigtrain.redact import redacted
from bigtrain.reporting.history import History
from bigtrain.reporting.logs import LogLine, Logs

_MARKS = ("config.toml", "provenance.json", "metrics.jsonl")
_SLOW_SECONDS = 10.0
"""How often folders are listed: on a cluster's file system that is not free."""


class Checkpoint(NamedTuple):
    """A committed checkpoint in a folder of this machine."""

    step: int
    time: float
    bytes: int


class Standing(NamedTuple):
    """How a run stands: a word, and what there is to say about it."""

    word: Literal["empty", "starting", "running", "silent", "gone", "done", "preempted", "failed"]
    text: str


def check_run(path: Path) -> None:
    """Raises UserError, with the runs nearby, when `path` is no run directory."""
    if any((path / name).is_file() for name in _MARKS):
        return
    what = "holds no run: no " + ", ".join(_MARKS) if path.is_dir() else "is no run directory"
    near = path if path.is_dir() else path.parent
    runs = sorted(
        (p.parent for p in near.glob("*/provenance.json")), key=lambda p: p.stat().st_mtime, reverse=True
    )
    there = ", ".join(map(str, runs[:8])) + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")
    hint = f"runs there: {there}" if runs else "give the --run-dir of a `bigtrain train`"
    raise UserError(what, where=str(path), do=hint)


class Watched:
    """One run directory. `look` reads what is new; everything else only tells."""

    def __init__(self, path: str | Path, most: int = 512) -> None:
        """`most`: points of a curve. Nothing is read yet, and the directory need not be there yet."""
        self.path = Path(path)
        self.history = History(self.path / "metrics.jsonl", most)
        self.settings: dict[str, Any] = {}
        """The resolved configuration under dotted keys."""
        self.attempts: list[dict[str, Any]] = []
        """What provenance.json says of every start of the command."""
        self.outcome: dict[str, Any] | None = None
        self.checkpoints: list[Checkpoint] = []
        self.log: list[LogLine] = []
        self.unreadable: list[str] = []
        """Files that are there and cannot be read."""
        self._logs = Logs(self.path / "logs")
        self._seen: dict[str, tuple[int, int]] = {}
        self._listed = -math.inf
        self._config: Any = None

    def look(self, attempts: int = 1) -> None:
        """Read what changed: small files when they did, appended metrics, folders every ten seconds.

        `attempts`: of how many, from the newest, the logs are read.
        """
        if self._changed("config.toml"):
            self._read_config()
        if self._changed("provenance.json"):
            found = self._json("provenance.json") or {}
            listed = found.get("attempts")
            self.attempts = [a for a in listed if isinstance(a, dict)] if isinstance(listed, list) else []
        self.history.read(self.starts())
        # After the metrics: an outcome is written when all steps are.
        self.outcome = self._json("outcome.json")
        if time.monotonic() - self._listed >= _SLOW_SECONDS or self.outcome:
            self._listed = time.monotonic()
            self.checkpoints = self._checkpoints()
            self.log = self._logs.read(attempts)

    @property
    def name(self) -> str:
        """The config's name, or the folder's."""
        return str(self.settings.get("name") or self.path.absolute().name)

    @property
    def where_checkpoints(self) -> str:
        """Folder or URL of the checkpoints."""
        return redacted(str(self.settings.get("checkpoint.folder") or self.path / "checkpoints"))

    def starts(self) -> list[float]:
        """When each attempt started, in seconds since 1970, ascending."""
        found: list[float] = []
        for attempt in self.attempts:
            at = math.nan
            with contextlib.suppress(KeyError, TypeError, ValueError):
                at = datetime.fromisoformat(attempt["started"]).timestamp()
            before = found[-1] if found else 0.0
            found.append(max(at, before) if math.isfinite(at) else before)
        return found

    def total_steps(self) -> int | None:
        """Steps of the whole run; None when the configuration does not tell."""
        if self._config is not None:
            last = self.history.last
            with contextlib.suppress(KeyError, TypeError, AssertionError):
                done = Progress(last["step"], last["samples"], last["tokens"]) if last else Progress()
                return BatchSchedule.of(self._config).total_steps(self._config, done)
        steps = self.settings.get("train.steps")
        return steps if isinstance(steps, int) else None

    def share_done(self) -> float | None:
        """Of the steps, 0 to 1."""
        total = self.total_steps()
        return min(1.0, self.history.step / total) if total else None

    def step_seconds(self) -> float | None:
        """Median of the last steps."""
        seconds = [s for r in self.history.recent if isinstance(s := r.get("seconds"), (int, float))]
        return statistics.median(seconds) if seconds else None

    def seconds_left(self) -> float | None:
        """By the last steps' median time."""
        total, each = self.total_steps(), self.step_seconds()
        return max(0, total - self.history.step) * each if total and each is not None else None

    def newest(self) -> float | None:
        """Time of the last record; None before the first."""
        times = [self.history.last.get("time"), *(e.time for e in self.history.evaluations[-1:])]
        return max((t for t in times if isinstance(t, (int, float))), default=None)

    def standing(self, now: float | None = None) -> Standing:
        """How the run stands at `now` (seconds since 1970)."""
        now = time.time() if now is None else now
        if self.outcome is not None:
            word, reason = self.outcome.get("state"), redacted(str(self.outcome.get("reason") or ""))
            if word in ("done", "preempted", "failed"):
                return Standing(word, reason)
        started = self.starts()[-1] if self.attempts else None
        newest = self.newest()
        if started is None and newest is None:
            return Standing("empty", "nothing has started here yet")
        fresh = newest is not None and newest >= (started or 0)
        age = max(0.0, now - (newest if newest is not None and fresh else started or 0))
        since = "no news for" if fresh else "started, and no first step for"
        patience = max(60.0, 10 * (self.step_seconds() or 0)) if fresh else 600.0
        if age > 10 and self.attempts and _vanished(self.attempts[-1]):
            last = self.attempts[-1]
            return Standing(
                "gone", f"process {last['pid']} is gone and left no outcome (killed?), {duration(age)} ago"
            )
        if age > patience:
            return Standing("silent", f"{since} {duration(age)}")
        return Standing("running", "") if fresh else Standing("starting", f"for {duration(age)}")

    def _read_config(self) -> None:
        """Settings from the TOML itself: a report must not depend on which bigtrain wrote it."""
        self.settings, self._config = {}, None
        try:
            raw = tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._unread("config.toml")
            return
        self.settings = {
            key: redacted(value) if isinstance(value, str) else value for key, value in _flat(raw).items()
        }
        with contextlib.suppress(UserError):
            self._config = load(self.path / "config.toml")

    def _json(self, name: str) -> dict[str, Any] | None:
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            self._unread(name)
            return None
        return found

    def _unread(self, name: str) -> None:
        if name not in self.unreadable:
            self.unreadable.append(name)

    def _changed(self, name: str) -> bool:
        try:
            stat = (self.path / name).stat()
        except OSError:
            return self._seen.pop(name, None) is not None
        mark = (stat.st_mtime_ns, stat.st_ino)
        changed = self._seen.get(name) != mark
        self._seen[name] = mark
        return changed

    def _checkpoints(self) -> list[Checkpoint]:
        """Those in a folder of this machine, oldest step first; none in an object store, which may be slow or shut."""
        folder = self.settings.get("checkpoint.folder") or self.path / "checkpoints"
        if "://" in str(folder):
            return []
        found = []
        for manifest in Path(folder).glob("step_*/manifest.json"):
            digits = manifest.parent.name.removeprefix("step_")
            with contextlib.suppress(OSError):
                if digits.isdigit():
                    size = sum(p.stat().st_size for p in manifest.parent.iterdir())
                    found.append(Checkpoint(int(digits), manifest.stat().st_mtime, size))
        return sorted(found)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting under its dotted key."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _vanished(attempt: Mapping[str, Any]) -> bool:
    """Whether the process of an attempt ran on this host and is no more."""
    pid = attempt.get("pid")
    if attempt.get("host") != socket.gethostname() or type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False
