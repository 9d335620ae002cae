"""The per-rank logs of a run: RUN/logs/0001/rank_0.log, one folder an attempt, one file a rank."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import NamedTuple

_TAIL = 1 << 16
_FILES = 256
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (\S+): (.*)")
LOUD = ("WARNING", "ERROR", "CRITICAL")


class LogLine(NamedTuple):
    """One message; `ranks` says on how many ranks the same one stands."""

    time: float
    level: str
    text: str
    attempt: int
    rank: int
    ranks: int = 1


class Logs:
    """The last messages of attempts; a file that did not grow is not read again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, tuple[int, list[LogLine]]] = {}

    def read(self, attempts: int = 1) -> list[LogLine]:
        """Messages of the newest `attempts` attempts in order of time: of the last 64 KiB of each file, and of the
        first 256 ranks that wrote any. From rank 0 all, from others warnings and errors; the same text counts once."""
        folders = [p for p in self._folder.glob("[0-9]*") if p.is_dir() and p.name.isdigit()]
        lines: list[LogLine] = []
        for folder in sorted(folders, key=lambda p: int(p.name))[-attempts:]:
            lines += _merged([line for file in _written(folder) for line in self._of(file)])
        return sorted(lines, key=lambda line: line.time)

    def _of(self, file: Path) -> list[LogLine]:
        try:
            size = file.stat().st_size
            if file not in self._known or self._known[file][0] != size:
                self._known[file] = (size, _lines(file, size))
        except OSError:  # moved aside while we looked
            return []
        return self._known[file][1]


def _written(folder: Path) -> list[Path]:
    """Log files that are not empty, by rank."""
    found = []
    for file in folder.glob("rank_*.log"):
        rank = file.stem.removeprefix("rank_")
        with contextlib.suppress(OSError):  # moved aside while we looked
            if rank.isdigit() and file.stat().st_size:
                found.append((int(rank), file))
    return [file for _, file in sorted(found)[:_FILES]]


def _lines(file: Path, size: int) -> list[LogLine]:
    """The messages in the last part of a file: first lines only, a traceback's stay in the file."""
    with file.open("rb") as f:
        f.seek(max(0, size - _TAIL))
        text = f.read(_TAIL).decode("utf-8", "replace")
    attempt, rank = int(file.parent.name), int(file.stem.removeprefix("rank_"))
    found = []
    for line in text.split("\n"):
        if (match := _LINE.fullmatch(line)) and (rank == 0 or match[2] in LOUD):
            at = time.mktime(time.strptime(match[1], "%Y-%m-%d %H:%M:%S"))
            found.append(LogLine(at, match[2], match[4], attempt, rank))
    return found


def _merged(lines: list[LogLine]) -> list[LogLine]:
    """The same message of several ranks as one."""
    by_text: dict[tuple[str, str], list[LogLine]] = {}
    for line in lines:
        by_text.setdefault((line.level, line.text), []).append(line)
    return [
        found[-1]._replace(rank=found[0].rank, ranks=len({line.rank for line in found}))
        for found in by_text.values()
    ]
