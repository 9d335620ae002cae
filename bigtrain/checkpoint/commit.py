"""A draft folder becomes a checkpoint: made and locked by rank 0, filled by all ranks, renamed when it is whole.

Only rank 0 calls these. At any moment a crash leaves either the whole checkpoint or a draft that nobody reads.
What an object store does instead of renaming is in `objects`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bigtrain
from bigtrain.checkpoint import objects
from bigtrain.checkpoint.boxes import Box, coverage_problem
from bigtrain.checkpoint.format import (
    MANIFEST,
    Manifest,
    StoredFile,
    StoredTensor,
    manifest_bytes,
    read_index,
    sync_folder,
    write_synced,
)
from bigtrain.checkpoint.location import exists, remote
from bigtrain.checkpoint.writer import write_refused
from bigtrain.errors import RunError


def begin(final: Path, needed: int) -> tuple[str, int]:
    """Clear stale drafts, check the space, make and lock this save's draft; returns its name and lock.

    `final.parent / name` is the draft, `lock` a file descriptor. `abandon` releases both.
    """
    root = final.parent
    try:
        if remote(root):
            # Nothing to lock, but a descriptor all the same: callers need not tell the two apart.
            return objects.begin(final), os.open(os.devnull, os.O_RDONLY)
        root.mkdir(parents=True, exist_ok=True)
        clear_stale(root)
        space = os.statvfs(root)
        if space.f_bavail * space.f_frsize < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        draft = root / f"{final.name}.tmp-{secrets.token_hex(4)}"
        draft.mkdir()
        lock = os.open(draft, os.O_RDONLY)
    except OSError as e:
        raise write_refused(e, final, needed) from e
    _locked_by_others(lock)
    return draft.name, lock


def abandon(draft: Path, lock: int) -> None:
    """End a save: release its lock and, unless it was committed, remove what it wrote. Never raises OSError."""
    if remote(draft):
        objects.finish(draft)
    else:
        shutil.rmtree(draft, ignore_errors=True)  # a committed one has another name by now
    with contextlib.suppress(OSError):
        os.close(lock)


def clear_stale(root: Path) -> None:
    """Remove what killed saves and prunes left: drafts that no living process holds locked."""
    if remote(root):
        objects.clear_stale(root)
        return
    for path in root.iterdir():
        if not re.fullmatch(r"step_\d{8,}\.tmp-.*", path.name):
            continue
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:  # gone already
            continue
        try:
            if not _locked_by_others(fd):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)


def _locked_by_others(fd: int) -> bool:
    """Lock a draft unless another save holds it. A process's end, however violent, gives its lock back."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # some network file systems lock no folders; there is one run in a run directory anyway
        return False
    return False


def commit(draft: Path, final: Path, files: Sequence[StoredFile], step: int, state: dict[str, Any]) -> None:
    """Check that the files make a whole, write the manifest, rename, sync. RunError when it cannot be."""
    # In a store the draft stays where it is, a folder of the checkpoint, and the manifest says so.
    stored = [replace(file, name=f"{draft.name}/{file.name}") for file in files] if remote(draft) else files
    manifest = Manifest(
        step=step,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "bigtrain": bigtrain.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        state=state,
        tensors=_whole_tensors(draft, files, step),
        files=tuple(stored),
    )
    content = manifest_bytes(manifest)
    try:
        if remote(draft):
            objects.commit(draft, final, content)
            return
        write_synced(draft / MANIFEST, content)
        sync_folder(draft)
        former = move_aside(final, "replaced") if final.exists() else None
        try:
            draft.rename(final)
        except OSError:
            if former is not None:
                former.rename(final)
            raise
        sync_folder(final.parent)
        clear_stale(final.parent)
    except OSError as e:
        raise write_refused(e, draft / MANIFEST, len(content)) from e


def _whole_tensors(draft: Path, files: Sequence[StoredFile], step: int) -> tuple[StoredTensor, ...]:
    """The logical tensors in the files, each covered exactly once; RunError naming the first that is not."""
    boxes: dict[StoredTensor, list[Box]] = defaultdict(list)
    for file in files:
        if not exists(draft / file.name):
            raise RunError(
                "rank 0 does not see the file that this rank wrote",
                where=f"rank {file.rank}, {draft / file.name}",
                do="the run directory must lie on a file system that all machines share",
            )
        for stored in read_index(draft, file, step):
            boxes[stored.tensor].append(stored.box)
    keys: dict[tuple[str, str], StoredTensor] = {}
    for tensor, found in boxes.items():
        former = keys.setdefault((tensor.kind, tensor.name), tensor)
        problem = coverage_problem(tensor.shape, found)
        if former != tensor:
            problem = f"ranks disagree: {former.dtype} {former.shape} and {tensor.dtype} {tensor.shape}"
        if problem:
            raise RunError(
                f"{tensor.kind} of {tensor.name}: {problem}; nothing was saved",
                where=str(draft),
                do="this is a bug in the engine's pieces: please report it with the layout",
            )
    return tuple(boxes)


def discard(path: Path) -> None:
    """Make a checkpoint vanish in one go. What is left of it in a file system, the next `clear_stale` removes."""
    if remote(path):
        objects.discard(path)
    else:
        move_aside(path, "pruned")


def move_aside(path: Path, why: str) -> Path:
    """Turn a checkpoint into a stale draft in one go: a kill during its removal leaves no torn checkpoint."""
    return path.rename(path.with_name(f"{path.name}.tmp-{why}-{secrets.token_hex(4)}"))
