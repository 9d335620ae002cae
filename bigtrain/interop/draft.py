"""Where an exported model is written until it is whole and compared, and how it gets to where it was asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.checkpoint import location
from bigtrain.checkpoint.format import sync_folder
from bigtrain.data.files import disk_errors
from bigtrain.errors import RunError, UserError

LAST = "config.json"
"""Uploaded last and removed first: without it nobody takes what lies in a store for a model."""
_BLOCK = 16 << 20


@contextmanager
def drafted(out: Path, needed: int, overwrite: bool) -> Iterator[Path]:
    """A folder that takes the place of `out` at the end, or is removed; it is uploaded if `out` is in a store.

    Raises UserError when `out` holds something, RunError when there is no room for `needed` bytes.
    """
    _check_place(out, overwrite)
    beside = Path(tempfile.gettempdir()) if location.remote(out) else out.parent
    with disk_errors(beside):
        beside.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(beside).free
    if free < needed:
        raise RunError(
            f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free",
            where=str(beside),
            do="free space, choose another "
            + ("TMPDIR" if location.remote(out) else "--to")
            + ", or a smaller --dtype",
        )
    with disk_errors(beside):
        draft = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=beside))
    try:
        yield draft
        if location.remote(out):
            _upload(draft, out)
            return
        draft.chmod(0o755)  # mkdtemp's are private
        with disk_errors(out):
            _replace(out, draft)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # still there only when something failed, or after an upload


def _check_place(out: Path, overwrite: bool) -> None:
    with location.within_reach(out):
        if location.remote(out):
            location.make_ready(out)  # to learn of a store that refuses before the work, not after it
        names = [""] if out.is_file() else location.names(out)
    if not names:
        return
    if not overwrite:
        raise UserError("is not empty", where=str(out), do="give another --to, or --overwrite")
    # Never somebody's home directory. In a store, weights without config.json are an upload that was cut short.
    weights = location.remote(out) and any(map(_is_weights, names))
    if LAST not in names and not weights:
        raise UserError(
            "holds something that is no exported model (no config.json)",
            where=str(out),
            do="give another --to",
        )


def _replace(out: Path, draft: Path) -> None:
    if not out.exists():
        draft.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.old-", dir=out.parent))
    out.rename(aside / out.name)
    draft.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _upload(draft: Path, out: Path) -> None:
    """Replace what is there; config.json goes first and comes last. What is no part of a model stays."""
    files = sorted(file for file in draft.iterdir() if file.name != LAST)
    with location.within_reach(out):
        location.remove(out / LAST)
        for name in filter(_is_weights, location.names(out)):
            location.remove(out / name)
        for file in files:
            with file.open("rb") as f, location.upload(out / file.name) as target:
                shutil.copyfileobj(f, target, _BLOCK)
            if (there := location.size(out / file.name)) != file.stat().st_size:
                raise RunError(
                    f"holds {there} bytes after {file.stat().st_size} were written",
                    where=str(out / file.name),
                    do="check the store, then export again with --overwrite",
                )
        location.put(out / LAST, (draft / LAST).read_bytes())


def _is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
