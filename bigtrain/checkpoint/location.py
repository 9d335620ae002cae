"""Where checkpoints and models lie: a folder, or a URL of an object store (s3://, gs://) through fsspec.

A place in a store is universal-pathlib's UPath, which has pathlib's methods; annotations say Path for both. What a
store does not do as a file system does (rename, sync, lock, read into a buffer) is here. Every failure in here is an
OSError, whatever the store's client raises.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from bigtrain.config import Config
from bigtrain.errors import BigtrainError, RunError, UserError

Fill = Callable[[memoryview, int], int]
"""Fill a buffer from a place in the file; returns the bytes that it got (fewer at the end of the file)."""


def place(where: str | Path) -> Path:
    """A path, or what stands for one in a store. UserError naming what to install for this kind of URL."""
    text = str(where)
    if isinstance(where, Path) or "://" not in text:
        return Path(where)
    if not isinstance(where, str):
        return where
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    try:
        from upath import UPath
    except ImportError as e:
        raise UserError(
            "a URL needs the extra `remote`",
            where=text,
            do='pip install "bigtrain[remote]"',
        ) from e
    try:
        found = UPath(text.rstrip("/"))
        found.fs  # noqa: B018  # makes the client, which is what may be missing
    except ImportError as e:
        raise UserError(f"needs a package that is not here: {e}", where=text, do="install it with pip") from e
    except ValueError as e:
        raise UserError(str(e), where=text, do="s3://, gs://, az:// or another protocol of fsspec") from e
    return cast(Path, found)


def remote(path: Path) -> bool:
    """Whether a place is in a store."""
    return not isinstance(path, Path)


def folder_of(run: Path, config: Config) -> Path:
    """The folder of a run's checkpoints. UserError when its store needs something that is not installed."""
    return place(config.checkpoint.folder) if config.checkpoint.folder else run / "checkpoints"


def make_ready(folder: Path) -> None:
    """Make the folder, or learn at the start, not after hours at the first save, that it cannot be written."""
    if not remote(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(
                f"cannot be made: {reason(e)}", where=str(folder), do="give another checkpoint.folder"
            ) from e
        return
    probe = folder / f".writable-{secrets.token_hex(4)}"
    try:
        put(probe, b"can a checkpoint be saved here?")
        remove(probe)
    except OSError as e:
        raise out_of_reach(e, folder) from e


def names(folder: Path) -> list[str]:
    """Names in a folder, unsorted; none when there is no such folder."""
    if not remote(folder):
        return [p.name for p in folder.iterdir()] if folder.is_dir() else []
    with _oserrors():
        store, inside = _store(folder)
        store.invalidate_cache()  # others write here too
        try:
            entries: list[str] = store.ls(inside, detail=False)
        except FileNotFoundError:
            return []
        found = (entry.rstrip("/") for entry in entries)
        return [entry.rpartition("/")[2] for entry in found if entry != inside.rstrip("/")]


def size(path: Path) -> int:
    """Bytes of a file."""
    return int(_info(path)["size"]) if remote(path) else path.stat().st_size


def exists(path: Path) -> bool:
    """Whether a file is there. Unlike fsspec's, it does not take a store that is out of reach for a no."""
    try:
        size(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read(path: Path, start: int = 0, end: int | None = None) -> bytes:
    """A file's bytes from `start` on, up to before `end`; fewer where the file ends earlier."""
    if not remote(path):
        with path.open("rb") as f:
            f.seek(start)
            return f.read() if end is None else f.read(end - start)
    with _oserrors():
        store, inside = _store(path)
        if end is None:
            return bytes(store.cat_file(inside))[start:]
        try:
            return bytes(store.cat_file(inside, start=start, end=end))
        except OSError as e:
            if e.errno != errno.EINVAL:  # S3's answer to a range behind the end of the file
                raise
            return b""


@contextmanager
def reading(path: Path) -> Iterator[Fill]:
    """Open a file to read parts of it, from several threads at a time."""
    if remote(path):
        yield lambda buffer, start: _fill(path, buffer, start)
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        yield lambda buffer, start: os.preadv(fd, [buffer], start)
    finally:
        os.close(fd)


def _fill(path: Path, buffer: memoryview, start: int) -> int:
    """One range request."""
    raw = read(path, start, start + len(buffer))
    buffer[: len(raw)] = raw
    return len(raw)


@contextmanager
def upload(path: Path) -> Iterator[IO[bytes]]:
    """Write an object of a store in parts of some 50 MB; it appears when the block ends."""
    with _oserrors():
        store, inside = _store(path)
        with store.open(inside, "wb") as f:
            yield f


def put(path: Path, content: bytes) -> None:
    """Write a small object of a store, or replace it, in one go: readers see the former or this one."""
    with _oserrors():
        store, inside = _store(path)
        store.pipe_file(inside, content)


def remove(path: Path) -> None:
    """Remove an object of a store, or all under it; nothing when there is none."""
    with _oserrors():
        store, inside = _store(path)
        store.invalidate_cache()
        try:
            store.rm(inside, recursive=True)
        except FileNotFoundError:
            return


def written_at(path: Path) -> float | None:
    """When an object was written, in seconds since 1970; None where the store does not say."""
    with _oserrors():
        return path.stat().st_mtime or None


def bytes_under(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    if not remote(folder):
        return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    with _oserrors():
        store, inside = _store(folder)
        store.invalidate_cache()
        return int(store.du(inside))


def reason(e: OSError) -> str:
    """Why, in words: the system's, or those of the store's client."""
    text = e.strerror or str(e)
    if (
        isinstance(e, FileNotFoundError) and " " not in text
    ):  # clients say the key, which the caller names already
        return os.strerror(errno.ENOENT)
    return text or type(e).__name__


def advice(e: OSError) -> str:
    """What to do about a store that refuses."""
    if isinstance(e, FileNotFoundError):
        return "check the bucket's name; buckets are not made by bigtrain"
    if isinstance(e, PermissionError):
        return (
            "give credentials that may write there: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        )
    return "check the network and the store's address (AWS_ENDPOINT_URL for S3-compatible ones)"


@contextmanager
def within_reach(path: Path) -> Iterator[None]:
    """Make `out_of_reach` of what goes wrong with a store; errors of a file system are the caller's to explain."""
    try:
        yield
    except OSError as e:
        if not remote(path):
            raise
        raise out_of_reach(e, path) from e


def out_of_reach(e: OSError, path: Path) -> BigtrainError:
    """The error for a store that cannot be used: the user's where they gave a wrong name or no credentials."""
    kind = UserError if isinstance(e, FileNotFoundError | PermissionError) else RunError
    return kind(f"cannot be reached: {reason(e)}", where=str(path), do=advice(e))


def _info(path: Path) -> dict[str, Any]:
    with _oserrors():
        store, inside = _store(path)
        store.invalidate_cache()
        return dict(store.info(inside))


def _store(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a place in a store, and its path in there."""
    place: Any = path
    return place.fs, place.path


@contextmanager
def _oserrors() -> Iterator[None]:
    """Make OSErrors of what a store's client raises: botocore's, for one, are plain Exceptions."""
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) or type(e).__module__.partition(".")[0] in (
            "builtins",
            "bigtrain",
            "torch",
        ):
            raise  # of the caller's block in `upload`, or a bug
        text = str(e) or type(e).__name__
        if "Credential" in type(e).__name__:
            raise PermissionError(errno.EACCES, text) from e
        raise OSError(errno.EIO, text) from e
