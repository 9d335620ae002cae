"""Save, replace and remove checkpoints in an object store, which can neither rename nor lock.

    step_00001000/
        manifest.json                                  names the data of one save; put last, in one go
        1f0c99a2-4711-5be8d213/rank_00000.bin          of one save: machine, process, random

Every save writes its data under a name of its own, so that a manifest never points at data of another save. A folder
without a manifest is no checkpoint. Only rank 0 calls these.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import re
import secrets
import time
from pathlib import Path

from bigtrain.checkpoint.format import MANIFEST, read_manifest, step_of
from bigtrain.checkpoint.location import exists, names, put, remove, written_at
from bigtrain.errors import BigtrainError

_DRAFT = re.compile(r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
_log = logging.getLogger(__name__)

# Data without a manifest from another machine is a running save or what a killed one left. No save takes a day.
_DAY = 24 * 3600.0

# This process's saves under way; whatever else bears its number was left by a failed one.
_under_way: set[str] = set()


def begin(final: Path) -> str:
    """Clear what killed saves left; the name, below the folder of all checkpoints, of this save's data."""
    clear_stale(final.parent)
    own = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    _under_way.add(own)
    return f"{final.name}/{own}"


def commit(draft: Path, final: Path, manifest: bytes) -> None:
    """Put the manifest, which names the draft's files; then remove the data of the one that it replaced."""
    former: set[str] = set()
    with contextlib.suppress(BigtrainError):  # an unreadable one is replaced; its data goes when it is old
        former = _named(final)
    put(final / MANIFEST, manifest)
    for name in former - {draft.name}:
        try:
            remove(final / name)
        except OSError as e:  # the save is done all the same
            _log.warning("%s stays: %s", final / name, e)


def finish(draft: Path) -> None:
    """Remove the draft unless a manifest names it: a put that seemed to fail may have come through."""
    try:
        if draft.name not in _named(draft.parent):
            remove(draft)
    except (OSError, BigtrainError) as e:  # the store is away, which the save's own error says
        _log.warning("%s stays: %s", draft, e)
    finally:
        _under_way.discard(draft.name)


def discard(path: Path) -> None:
    """Remove a checkpoint, its manifest first: a kill meanwhile leaves data that nobody reads."""
    remove(path / MANIFEST)
    remove(path)


def clear_stale(root: Path) -> None:
    """Remove the data that no manifest names and that no living save writes."""
    for step in names(root):
        if step_of(step) is None:
            continue
        inside = names(root / step)
        drafts = [name for name in inside if _DRAFT.fullmatch(name)]
        if MANIFEST in inside and len(drafts) < 2:
            continue  # a checkpoint and its data
        with contextlib.suppress(BigtrainError):  # who knows what an unreadable manifest names
            named = _named(root / step)
            for name in drafts:
                if name not in named and _left_behind(root / step / name):
                    remove(root / step / name)


def _named(folder: Path) -> set[str]:
    """The saves whose data the manifest names; none without a manifest. DamagedError if it is unreadable."""
    if not exists(folder / MANIFEST):
        return set()
    return {file.name.partition("/")[0] for file in read_manifest(folder).files}


def _left_behind(draft: Path) -> bool:
    """Whether the process that wrote a draft is surely gone: it ran on this machine, or a day has passed."""
    found = _DRAFT.fullmatch(draft.name)
    assert found is not None, "drafts were chosen by their names"
    if found[1] == _machine():
        pid = int(found[2])
        return draft.name not in _under_way if pid == os.getpid() else not _runs(pid)
    times = [written_at(draft / name) for name in names(draft)]
    return all(t is not None and t < time.time() - _DAY for t in times)


def _machine() -> str:
    """Where process numbers are told apart: this boot of this machine, in this container."""
    parts = [platform.node()]
    for read in (Path("/proc/sys/kernel/random/boot_id").read_text, lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(read())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
