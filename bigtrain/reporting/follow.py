"""Reading a file of lines that another process appends to, cuts back or replaces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_BATCH = 1 << 20


class Follower:
    """Gives out each complete line of a growing file once; what was read is not read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self._end = 0
        self._last = b""
        self._inode = -1

    def rewound(self) -> bool:
        """Whether lines that were given out are no longer in the file: forget them, the next ones are the first.

        A run that resumes cuts its metrics back; `--fresh` begins another file. Both may have grown past the place
        where we were, so the last line is compared, too.
        """
        if not self._end:
            return False
        try:
            with self.path.open("rb") as f:
                same = os.fstat(f.fileno()).st_ino == self._inode
                f.seek(self._end - len(self._last))
                same = same and f.read(len(self._last)) == self._last
        except FileNotFoundError:
            same = False
        if not same:
            self._start_over()
        return not same

    def batches(self) -> Iterator[list[bytes]]:
        """The complete lines that were not given out yet, about a megabyte at a time; none without a file."""
        try:
            f = self.path.open("rb")
        except FileNotFoundError:
            return
        with f:
            self._inode = os.fstat(f.fileno()).st_ino
            f.seek(self._end)
            while lines := f.readlines(_BATCH):
                if not lines[-1].endswith(b"\n"):  # being written, or torn by a kill
                    lines.pop()
                if not lines:
                    return
                self._end += sum(map(len, lines))
                self._last = lines[-1]
                yield lines
