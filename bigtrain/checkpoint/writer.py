"""One rank's data file: its boxes in one pass, checksummed while they are written."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from bigtrain.checkpoint.boxes import Box
from bigtrain.checkpoint.format import (
    ALIGNMENT,
    BLOCK,
    StoredBox,
    StoredFile,
    StoredTensor,
    index_bytes,
    sync_folder,
)
from bigtrain.checkpoint.location import advice, reason, remote, upload
from bigtrain.errors import RunError
from bigtrain.logical import Piece, boxes_of_flat_range


def bytes_of(pieces: Sequence[Piece]) -> int:
    """Bytes that the pieces take in a file, without alignment and index."""
    return sum(p.tensor.numel() * p.tensor.element_size() for p in pieces)


def write_file(path: Path, pieces: Sequence[Piece], *, step: int, rank: int) -> StoredFile:
    """Write and sync one rank's pieces. Raises RunError with the bytes needed when the system refuses."""
    boxes: list[StoredBox] = []
    try:
        with _created(path) as f:
            for piece in pieces:
                f.write(bytes(-f.tell() % ALIGNMENT))
                start = f.tell()
                crcs: list[int] = []
                for block in _blocks(piece.tensor.detach()):
                    crcs.append(zlib.crc32(block))
                    f.write(block)
                dtype = str(piece.tensor.dtype).removeprefix("torch.")
                tensor = StoredTensor(piece.kind, piece.name, tuple(piece.shape), dtype)
                box = Box(tuple(piece.offset), tuple(piece.tensor.shape))
                boxes.append(StoredBox(tensor, box, start, tuple(crcs)))
            index = index_bytes(step, rank, boxes)
            index_start = f.tell()
            f.write(index)
    except OSError as e:
        raise write_refused(e, path, bytes_of(pieces)) from e
    return StoredFile(path.name, rank, index_start + len(index), index_start, zlib.crc32(index))


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    """A new file, safely stored when the block ends."""
    if remote(path):
        with upload(path) as f:
            yield f
        return
    with path.open("wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    sync_folder(path.parent)


def write_refused(e: OSError, path: Path, needed: int) -> RunError:
    """The error for a file that could not be written: errno's text, bytes needed and free, what to do."""
    again = "then run the same command again: it resumes from the newest checkpoint, which is intact"
    if remote(path):
        what = f"could not be written: {reason(e)} (this file needs {needed / 1e6:,.1f} MB)"
        return RunError(what, where=str(path), do=f"{advice(e)}; {again}")
    try:
        space = os.statvfs(path.parent)
        free = f", {space.f_bavail * space.f_frsize / 1e6:,.1f} MB are free"
    except OSError:
        free = ""
    do = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "your quota is used up: free some space",
        errno.EFBIG: "this process may not write files of that size: raise `ulimit -f`",
        errno.EROFS: "the file system is read-only: choose another run directory",
        errno.EACCES: "give yourself the right to write there",
    }.get(e.errno or 0, "check the file system")
    return RunError(
        f"could not be written: {reason(e)} (this file needs {needed / 1e6:,.1f} MB{free})",
        where=str(path),
        do=f"{do}, {again}",
    )


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, BLOCK at a time, through at most one block of extra memory."""
    count = BLOCK // tensor.element_size()
    staged = None if tensor.is_contiguous() else torch.empty(min(count, tensor.numel()), dtype=tensor.dtype)
    for start in range(0, tensor.numel(), count):
        if staged is None:
            block = tensor.view(-1)[start : start + count].cpu()
        else:
            block = staged[: tensor.numel() - start]
            for part in boxes_of_flat_range(tuple(tensor.shape), start, len(block)):
                box = Box(part.offset, part.sizes)
                flat = block[part.start - start : part.start - start + box.elements]
                flat.view(box.sizes).copy_(tensor[box.within((0,) * tensor.dim())])
        yield memoryview(block.view(torch.uint8).numpy().data)
