"""The folder of a run's checkpoints: save and commit, list, find the newest sound one, resume from it, prune.

A save writes into `step_00001000.tmp-XXXX`, where every rank writes one file, then rank 0 the manifest;
renaming the folder commits. At any moment a crash leaves either the whole checkpoint or a draft that nobody
reads. The folder may also be a URL of an object store, where putting the manifest commits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.commit import abandon, begin, clear_stale, commit, discard
from bigtrain.checkpoint.format import MANIFEST, DamagedError, step_name, step_of
from bigtrain.checkpoint.location import exists, names, out_of_reach, place, reason, remote
from bigtrain.checkpoint.reader import load, load_weights, verify_checkpoint
from bigtrain.checkpoint.writer import bytes_of, write_file
from bigtrain.errors import BigtrainError, RunError
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh

__all__ = [
    "DamagedError",
    "Resumed",
    "discard_later",
    "list_checkpoints",
    "load",
    "load_weights",
    "newest",
    "prune",
    "resume",
    "save",
]

_log = logging.getLogger(__name__)


class Draft(NamedTuple):
    """A save under way: where this rank writes, and what rank 0 makes of it."""

    path: Path
    final: Path
    lock: int
    """Rank 0's; -1 on the others."""
    step: int
    rank: int

    @property
    def file(self) -> Path:
        """This rank's data file."""
        return self.path / f"rank_{self.rank:05d}.bin"


def begin_together(root: str | Path, step: int, needed: int, mesh: Mesh) -> Draft:
    """Rank 0 makes the draft of root/step_NNNNNNNN, all learn where it is (collective). Raises as `save`."""
    final = place(root) / step_name(step)
    name, lock = together(mesh, lambda: begin(final, needed) if mesh.first else ("", -1))[0]
    return Draft(final.parent / name, final, lock, step, mesh.rank)


def save(root: str | Path, step: int, pieces: Iterable[Piece], state: dict[str, Any], mesh: Mesh) -> Path:
    """Write root/step_NNNNNNNN (collective); returns its path once it is committed and on the disk.

    The pieces of all ranks together must cover every element of every tensor once. `state` (JSON-able) is
    rank 0's. Raises RunError on every rank when one rank cannot write or an element is missing or doubled;
    the draft is removed and older checkpoints stay as they are. A former checkpoint of this step is replaced.
    """
    mine = list(pieces)
    draft = begin_together(root, step, int(mesh.sum([bytes_of(mine)])[0]), mesh)
    try:
        files = together(mesh, lambda: write_file(draft.file, mine, step=step, rank=draft.rank))
        together(mesh, lambda: commit(draft.path, draft.final, files, step, state) if mesh.first else None)
    finally:
        if mesh.first:
            abandon(draft.path, draft.lock)
    return draft.final


def list_checkpoints(root: str | Path) -> list[Path]:
    """Committed checkpoints, oldest step first; whether they are sound is not looked at."""
    root = place(root)
    try:
        found = [root / name for name in names(root) if step_of(name) is not None]
        if remote(root):
            found = [path for path in found if exists(path / MANIFEST)]
    except OSError as e:
        if not remote(root):
            raise
        raise out_of_reach(e, root) from e  # "there are none" would start a run over
    return sorted(found, key=lambda p: step_of(p.name) or 0)


def newest(root: str | Path, verify: bool = True) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint (None if there is none), and a sentence for each newer one passed over.

    `verify` reads and checks all its data; without it only the manifest, the indexes and the file sizes.
    """
    warnings: list[str] = []
    for path in reversed(list_checkpoints(root)):
        problems = verify_checkpoint(path, data=verify)
        if not problems:
            return path, warnings
        warnings += [f"skipped {path.name}: {problem}" for problem in problems]
    return None, warnings


@dataclass(frozen=True)
class Resumed:
    """From where a run goes on."""

    path: Path
    state: dict[str, Any]
    warnings: list[str]
    """One sentence for each newer checkpoint that is damaged and was passed over."""


def resume(
    root: str | Path,
    pieces: Callable[[], Iterable[Piece]],
    mesh: Mesh,
    *,
    verify: bool = True,
    on_damage: Literal["older", "stop"] = "older",
    latest: int | None = None,
) -> Resumed | None:
    """Fill `pieces()` from the newest sound checkpoint (collective), reading once; None if there is none.

    `latest` leaves aside the checkpoints of later steps.

    Raises UserError when it is of another model or optimizer, RunError when checkpoints exist but none is
    sound, or when the newest is not and `on_damage` is "stop".
    """
    paths = together(mesh, lambda: list_checkpoints(root) if mesh.first else [])[0]
    warnings: list[str] = []
    for path in reversed(paths):
        if latest is not None and (step_of(path.name) or 0) > latest:
            continue
        try:
            return Resumed(path, load(path, pieces(), verify=verify, mesh=mesh), warnings)
        except DamagedError as e:
            if on_damage == "stop":
                raise RunError(
                    f"the newest checkpoint is damaged, and checkpoint.on_damage is stop\n    {e}",
                    where=str(path),
                    do="restore the file, or go on from an older one: --set checkpoint.on_damage=older",
                ) from e
            warnings.append(f"skipped {path.name}: {e}")
    if warnings:
        raise RunError(
            "no checkpoint is sound\n    " + "\n    ".join(warnings),
            where=str(root),
            do="restore the files, or start over with --fresh (moves the run aside)",
        )
    return None


def discard_later(root: str | Path, step: int) -> list[Path]:
    """Remove the checkpoints of steps after `step`, newest first; call it on one rank. Returns what was removed.

    A kill in between leaves checkpoints without gaps. Raises RunError when one cannot be removed.
    """
    later = [path for path in reversed(list_checkpoints(root)) if (step_of(path.name) or 0) > step]
    for path in later:
        try:
            discard(path)
        except OSError as e:
            raise RunError(
                f"a checkpoint after the step to go back to cannot be removed: {reason(e)}",
                where=str(path),
                do="remove it, then run the same command again",
            ) from e
    return later


def prune(root: str | Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Remove all but the `keep_last` newest sound checkpoints and the steps that are multiples of
    `keep_every`.

    Call it on one rank after a commit. Sound here means by manifest, indexes and sizes; the newest sound one
    always stays, and whatever is newer than it. Returns what was removed.
    """
    if keep_last < 1:
        raise ValueError("keep_last is at least 1")
    root = place(root)
    removed: list[Path] = []
    try:  # one rank must not die of this while the others train on
        for path in _surplus(root, keep_last, keep_every):
            try:
                discard(path)
            except OSError as e:
                _log.warning("%s stays: %s", path, reason(e))
                continue
            removed.append(path)
        if removed:
            clear_stale(root)
    except (OSError, BigtrainError) as e:
        _log.warning("old checkpoints of %s stay: %s", root, e)
    return removed


def _surplus(root: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Checkpoints that `prune` removes, newest first."""
    found: list[Path] = []
    kept = 0
    for path in reversed(list_checkpoints(root)):
        if kept < keep_last:
            kept += not verify_checkpoint(path, data=False)
        elif not (keep_every and (step_of(path.name) or 0) % keep_every == 0):
            found.append(path)
    return found
