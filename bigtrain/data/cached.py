"""A corpus in an object store: its files are copied to a local folder when they are first read, and checked.

The copies of one content lie in a folder named by the URL and the manifest's digest, so that a corpus that is prepared
anew in the same place never meets old ones. All processes of a machine share them; one copies, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from bigtrain.data.files import commit, disk_errors, temporary, write_whole
from bigtrain.data.shards import ShardInfo, altered
from bigtrain.errors import RunError, UserError

_TRIES = 4
"""Attempts at one file, one, two and four seconds apart."""


def is_url(path: str | Path) -> bool:
    """Whether a corpus lies in a store."""
    return "://" in str(path)


def default_folder() -> Path:
    """Where copies lie unless a config says otherwise: BIGTRAIN_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("BIGTRAIN_CACHE") or f"{base}/bigtrain/corpora")


class Copies:
    """The local copies of one corpus."""

    def __init__(self, url: str, folder: Path, files: tuple[str, ...]) -> None:
        """Copy `files` at once; the first of them, JSON, says by "digest" which content it is.

        UserError if the store cannot be reached, or has no such corpus.
        """
        try:
            import fsspec  # type: ignore[import-untyped]
        except ImportError as e:
            raise UserError(
                "a URL needs the extra `remote`", where=url, do='pip install "bigtrain[remote]"'
            ) from e
        self.url = url.rstrip("/")
        try:
            self._store, self._inside = fsspec.core.url_to_fs(self.url)
            first = bytes(self._store.cat_file(f"{self._inside}/{files[0]}"))
        except (ImportError, ValueError) as e:
            raise UserError(f"cannot be opened: {e}", where=url, do="give a URL that fsspec knows") from e
        except Exception as e:  # a store's client raises what it likes
            raise UserError(
                f"there is no {files[0]}, or the store is out of reach ({type(e).__name__}: {str(e)[:200]})",
                where=url,
                do="check the URL and the credentials; `bigtrain prepare` writes a corpus, which you copy there",
            ) from e
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = folder / name / _digest(first)
        self._shards: dict[str, ShardInfo] = {}
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._once(self.folder / files[0], lambda file: write_whole(file, first))
        for file in files[1:]:
            self.local(self.folder / file)

    def expect(self, shards: list[ShardInfo]) -> None:
        """Shards whose sizes and checksums are compared when their files are copied."""
        self._shards |= {shard.name: shard for shard in shards}

    def local(self, file: Path) -> Path:
        """A file of the folder, copied if it is not there. RunError if that fails, or it is not what was written."""
        self._once(file, self._copy)
        return file

    def _once(self, file: Path, make: Callable[[Path], None]) -> None:
        """Make a file unless it is there; of all processes of the machine one makes it, and the others wait."""
        if file.exists():
            return
        lock = file.with_name(f".{file.name}.lock")
        with disk_errors(lock), open(lock, "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # freed by the system if this process dies
            if not file.exists():
                make(file)

    def _copy(self, file: Path) -> None:
        for attempt in range(_TRIES):
            try:
                self._store.get_file(f"{self._inside}/{file.name}", str(temporary(file)))
                problem = self._problem(file)
            except Exception as e:  # a store's client raises what it likes, and a full disk is an OSError
                problem = f"{type(e).__name__}: {str(e)[:200]}"
            if not problem:
                with disk_errors(file):
                    commit(file)
                return
            if attempt < _TRIES - 1:
                time.sleep(2**attempt)
        temporary(file).unlink(missing_ok=True)
        raise RunError(
            f"could not be copied to {file.parent}: {problem}",
            where=f"{self.url}/{file.name}",
            do="check the store and the space in data.cache, then run the same command again: it resumes",
        )

    def _problem(self, file: Path) -> str:
        """Why a copied file is not what was written; "" if it is, or nothing is known of it."""
        shard = self._shards.get(file.stem)
        if shard is None or file.suffix not in shard.files:
            return ""
        size = temporary(file).stat().st_size
        if size != shard.files[file.suffix]:
            return f"has {size} bytes, expected {shard.files[file.suffix]}"
        return altered(shard, file.suffix, temporary(file))


def _digest(manifest: bytes) -> str:
    """The content that a manifest says it describes; read_manifest checks it later."""
    try:
        return str(json.loads(manifest)["digest"])[:16]
    except (ValueError, KeyError, TypeError):
        return hashlib.sha256(manifest).hexdigest()[:16]
