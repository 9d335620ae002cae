"""Files that are whole or absent: written aside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.errors import RunError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or any other write error into a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            reason, advice = (
                "no space left",
                "free space or choose another folder, then run the command again",
            )
        else:
            reason, advice = error.strerror or str(error), "check the folder and its disk, then run again"
        raise RunError(f"cannot write: {reason}", where=str(path), do=advice) from error


def temporary(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(path.name + ".tmp")


def commit(path: Path) -> None:
    """Rename the finished temporary file to `path` and make the name itself durable."""
    os.replace(temporary(path), path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` as `path`, which never holds part of it. RunError if the disk is full."""
    with disk_errors(path):
        try:
            with open(temporary(path), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            commit(path)
        except OSError:
            temporary(path).unlink(missing_ok=True)
            raise
