"""Open plain, gzip and zstandard files for reading; a file cut short is an error, not a short text."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from bigtrain.errors import UserError


def optional(module: str, extra: str, path: Path) -> ModuleType:
    """Import a package that only some inputs need. UserError that names the extra if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"needs the package {module.split('.')[0]}",
            where=str(path),
            do=f'pip install "bigtrain[{extra}]"',
        ) from error


@contextmanager
def open_packed(path: Path, packed: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file's bytes after unpacking, and the raw file, whose tell() shows how far it was read.

    `packed` is "", "gz" or "zst". UserError if the file cannot be read or is damaged, in any later read too.
    """
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    zstd = None
    if packed == "zst":
        zstd = optional("zstandard", "zstd", path)
        damaged += (zstd.ZstdError,)
    try:
        with open(path, "rb", buffering=2**20) as raw:
            if packed == "gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
            elif zstd is not None:
                yield cast(BinaryIO, io.BufferedReader(_Zstandard(raw, zstd), 2**20)), raw
            else:
                yield raw, raw
    except damaged as error:
        raise UserError(
            f"is damaged or not a .{packed} file ({error})",
            where=str(path),
            do="fetch the file again, or leave it out",
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or error}", where=str(path), do="check the file"
        ) from error


class _Zstandard(io.RawIOBase):
    """zstandard 0.25's stream_reader takes a truncated file for a whole one; this checks each frame's end."""

    def __init__(self, raw: BinaryIO, zstd: ModuleType) -> None:
        self._raw = raw
        self._new = zstd.ZstdDecompressor(max_window_size=2**31).decompressobj
        self._frame: Any = self._new()
        self._begun = False  # the current frame has got bytes
        self._left = memoryview(b"")  # unpacked, not yet handed out

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            packed = self._raw.read(2**17)
            if not packed:
                if self._begun:
                    raise EOFError("it ends in the middle")
                return 0
            self._left = memoryview(self._unpack(packed))
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def _unpack(self, packed: bytes) -> bytes:
        out = []
        while packed:
            self._begun = True
            out.append(self._frame.decompress(packed))
            packed = b""
            if self._frame.eof:
                packed = self._frame.unused_data
                self._frame = self._new()
                self._begun = False
        return b"".join(out)
