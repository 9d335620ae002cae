"""The folder of a run's checkpoints: save and commit, list, find the newest sound one, resume from it, prune.

A save writes into `step_00001000.tmp-XXXX`, where every rank writes one file, then rank 0 the manifest;
renaming the folder commits. At any moment a crash leaves either the whole checkpoint or a draft that nobody
reads.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bigtrain
from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.boxes import Box, coverage_problem
from bigtrain.checkpoint.format import (
    MANIFEST,
    DamagedError,
    Manifest,
    StoredFile,
    StoredTensor,
    manifest_bytes,
    read_index,
    step_name,
    step_of,
    sync_folder,
    write_synced,
)
from bigtrain.checkpoint.reader import load, load_weights, open_checkpoint, verify_checkpoint
from bigtrain.checkpoint.writer import bytes_of, write_file, write_refused
from bigtrain.errors import RunError
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh

__all__ = [
    "DamagedError",
    "Resumed",
    "list_checkpoints",
    "load",
    "load_weights",
    "newest",
    "prune",
    "resume",
    "save",
]


def save(root: str | Path, step: int, pieces: Iterable[Piece], state: dict[str, Any], mesh: Mesh) -> Path:
    """Write root/step_NNNNNNNN (collective); returns its path once it is committed and on the disk.

    The pieces of all ranks together must cover every element of every tensor once. `state` (JSON-able) is
    rank 0's. Raises RunError on every rank when one rank cannot write or an element is missing or doubled;
    the draft is removed and older checkpoints stay as they are. A former checkpoint of this step is replaced.
    """
    root = Path(root)
    mine = list(pieces)
    needed = int(mesh.sum([bytes_of(mine)])[0])
    final = root / step_name(step)
    name, lock = together(mesh, lambda: _begin(final, needed) if mesh.first else ("", -1))[0]
    draft = root / name
    try:
        path = draft / f"rank_{mesh.rank:05d}.bin"
        files = together(mesh, lambda: write_file(path, mine, step=step, rank=mesh.rank))
        together(mesh, lambda: _commit(draft, final, files, step, state) if mesh.first else None)
    finally:
        if mesh.first:
            shutil.rmtree(draft, ignore_errors=True)  # still there only when the save failed
            os.close(lock)
    return final


def _begin(final: Path, needed: int) -> tuple[str, int]:
    """Clear stale drafts, check the space, make and lock this save's draft; returns its name and lock."""
    root = final.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clear_stale(root)
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


def _clear_stale(root: Path) -> None:
    """Remove what killed saves and prunes left: drafts that no living process holds locked."""
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


def _commit(draft: Path, final: Path, files: Sequence[StoredFile], step: int, state: dict[str, Any]) -> None:
    """Check that the files make a whole, write the manifest, rename, sync."""
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
        files=tuple(files),
    )
    content = manifest_bytes(manifest)
    try:
        write_synced(draft / MANIFEST, content)
        sync_folder(draft)
        former = _move_aside(final, "replaced") if final.exists() else None
        try:
            draft.rename(final)
        except OSError:
            if former is not None:
                former.rename(final)
            raise
        sync_folder(final.parent)
        _clear_stale(final.parent)
    except OSError as e:
        raise write_refused(e, draft / MANIFEST, len(content)) from e


def _whole_tensors(draft: Path, files: Sequence[StoredFile], step: int) -> tuple[StoredTensor, ...]:
    """The logical tensors in the files, each covered exactly once; RunError naming the first that is not."""
    boxes: dict[StoredTensor, list[Box]] = defaultdict(list)
    for file in files:
        if not (draft / file.name).exists():
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


def _move_aside(path: Path, why: str) -> Path:
    """Turn a checkpoint into a stale draft in one go: a kill during its removal leaves no torn checkpoint."""
    return path.rename(path.with_name(f"{path.name}.tmp-{why}-{secrets.token_hex(4)}"))


def list_checkpoints(root: str | Path) -> list[Path]:
    """Committed checkpoints, oldest step first; whether they are sound is not looked at."""
    root = Path(root)
    found = [p for p in root.iterdir() if step_of(p.name) is not None] if root.is_dir() else []
    return sorted(found, key=lambda p: step_of(p.name) or 0)


def newest(root: str | Path, verify: bool = True) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint (None if there is none), and a sentence for each newer one passed over.

    `verify` reads and checks all its data; without it only the manifest, the indexes and the file sizes.
    """
    warnings: list[str] = []
    for path in reversed(list_checkpoints(root)):
        problems = verify_checkpoint(path) if verify else _outside_problems(path)
        if not problems:
            return path, warnings
        warnings += [f"skipped {path.name}: {problem}" for problem in problems]
    return None, warnings


def _outside_problems(path: Path) -> list[str]:
    try:
        open_checkpoint(path)
    except DamagedError as e:
        return [str(e)]
    return []


@dataclass(frozen=True)
class Resumed:
    """From where a run goes on."""

    path: Path
    state: dict[str, Any]
    warnings: list[str]
    """One sentence for each newer checkpoint that is damaged and was passed over."""


def resume(
    root: str | Path, pieces: Callable[[], Iterable[Piece]], mesh: Mesh, *, verify: bool = True
) -> Resumed | None:
    """Fill `pieces()` from the newest sound checkpoint (collective), reading once; None if there is none.

    Raises UserError when it is of another model or optimizer, RunError when checkpoints exist but none is
    sound.
    """
    paths = together(mesh, lambda: list_checkpoints(root) if mesh.first else [])[0]
    warnings: list[str] = []
    for path in reversed(paths):
        try:
            return Resumed(path, load(path, pieces(), verify=verify, mesh=mesh), warnings)
        except DamagedError as e:
            warnings.append(f"skipped {path.name}: {e}")
    if warnings:
        raise RunError(
            "no checkpoint is sound\n    " + "\n    ".join(warnings),
            where=str(root),
            do="restore the files, or start over with --fresh (moves the run aside)",
        )
    return None


def prune(root: str | Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Remove all but the `keep_last` newest sound checkpoints and the steps that are multiples of
    `keep_every`.

    Call it on one rank after a commit. Sound here means by manifest, indexes and sizes; the newest sound one
    always stays, and whatever is newer than it. Returns what was removed.
    """
    if keep_last < 1:
        raise ValueError("keep_last is at least 1")
    removed: list[Path] = []
    kept = 0
    for path in reversed(list_checkpoints(root)):
        step = step_of(path.name) or 0
        if kept < keep_last:
            kept += not _outside_problems(path)
        elif not (keep_every and step % keep_every == 0):
            try:
                _move_aside(path, "pruned")
            except OSError as e:  # one rank must not die of this while the others train on
                logging.getLogger(__name__).warning("%s stays: %s", path, e.strerror)
                continue
            removed.append(path)
    if removed:
        _clear_stale(Path(root))
    return removed
