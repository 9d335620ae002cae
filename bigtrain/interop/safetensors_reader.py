"""Read boxes of tensors from safetensors files: only the bytes of the box, through a bounded buffer.

A file is 8 bytes of header length, a JSON header, raw little-endian data. It is read here with pread or, in an object
store, range requests rather than through the library, because every rank wants its box of a tensor and an error wants
the file's name: mapped memory turns a bad disk into SIGBUS. What a header claims is checked against the file before
anything is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.boxes import Box, Index
from bigtrain.checkpoint.location import Fill, exists, read, reading, reason, remote, size
from bigtrain.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What can be a weight. Integers and 8-bit floats are codes of something, not weights."""
BUFFER = 16 << 20
"""Bytes read at a time."""
_MOST_HEADER = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    dtype: str
    shape: Index
    start: int
    """Its first byte in the file."""


class SafetensorsWeights:
    """All tensors of a directory with one safetensors file or several and an index."""

    def __init__(self, folder: Path) -> None:
        """Reads headers only. UserError naming the file that is missing, truncated or not what it claims."""
        self.folder = folder
        self.tensors: dict[str, Entry] = {}
        if exists(folder / INDEX):
            self._open_indexed()
        else:
            self.tensors = read_header(folder / SINGLE)
        self.shapes = {name: entry.shape for name, entry in self.tensors.items()}

    def _open_indexed(self) -> None:
        path = self.folder / INDEX
        listed = read_json(path).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise UserError("has no weight_map of tensors to files", where=str(path), do=_AGAIN)
        names = sorted(set(listed.values()))
        strange = [name for name in names if Path(name).name != name]
        if strange:
            raise UserError(f"names a file outside the directory: {strange[0]!r}", where=str(path), do=_AGAIN)
        missing = [name for name in names if not exists(self.folder / name)]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(names)} files are missing: {', '.join(missing[:5])}",
                where=str(path),
                do=_AGAIN,
            )
        headers = {name: read_header(self.folder / name) for name in names}
        for tensor, name in listed.items():
            if tensor not in headers[name]:
                raise UserError(
                    f"{tensor} is not in it, though {INDEX} says so", where=str(self.folder / name), do=_AGAIN
                )
            self.tensors[tensor] = headers[name][tensor]

    def problem(self, name: str) -> str:
        """Why a tensor that is there cannot be read; "" when it can."""
        dtype = self.tensors[name].dtype
        return "" if dtype in DTYPES else f"has dtype {dtype}; bigtrain reads {', '.join(DTYPES)}"

    def read(self, name: str, box: Box, target: torch.Tensor) -> None:
        """Copy a box into `target`, a tensor or view of the box's sizes, casting to its dtype.

        Reads the bytes of the box and no others, except in a store: a request takes as long as megabytes, so there
        whole rows are read. Takes BUFFER bytes, or one row if that is longer.
        """
        entry = self.tensors[name]
        dtype = DTYPES[entry.dtype]
        item, N = dtype.itemsize, entry.shape[-1] if entry.shape else 1
        # All weights have one or two dimensions; one dimension is one row.
        (row, column), (rows, columns) = ((0, 0, *x)[-2:] for x in (box.offset, box.sizes))
        rows = rows if len(box.sizes) > 1 else 1
        columns = columns if box.sizes else 1
        view = target.detach().view(1, -1) if target.dim() < 2 else target.detach()
        # The columns that are read, of which `inside` are wanted.
        left, width = (0, N) if remote(entry.file) and rows > 1 else (column, columns)
        inside = slice(column - left, column - left + columns)
        height = max(1, min(rows, BUFFER // (width * item)))
        buffer = torch.empty(height * width * item, dtype=torch.uint8)
        with _explained(entry.file), reading(entry.file) as fill:
            for top in range(0, rows, height):
                count = min(height, rows - top)
                raw = buffer[: count * width * item]
                first = entry.start + ((row + top) * N + left) * item
                stretches = 1 if width == N else count
                length = len(raw) // stretches
                for i in range(stretches):
                    part = memoryview(raw.numpy().data)[i * length : (i + 1) * length]
                    read_exactly(fill, part, first + i * N * item, entry.file, name)
                view[top : top + count].copy_(raw.view(dtype).view(count, width)[:, inside])


_AGAIN = "copy or download the directory again"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Make UserErrors that name the file of what a disk or a store answers."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot be read: {reason(e)}", where=str(path), do=_AGAIN) from e


def read_exactly(fill: Fill, target: memoryview, start: int, path: Path, name: str) -> None:
    """Fill `target` from `start` on; a read may return less than asked. UserError when the file ends before."""
    done = 0
    while done < len(target):
        got = fill(target[done:], start + done)
        if got == 0:
            raise UserError(f"ends inside {name}", where=str(path), do=_AGAIN)
        done += got


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError when the file is missing or something else."""
    try:
        with _explained(path):
            found = json.loads(read(path))
    except ValueError as e:
        raise UserError(f"is not JSON: {e}", where=str(path), do=_AGAIN) from e
    if not isinstance(found, dict):
        raise UserError("is not a JSON object", where=str(path), do=_AGAIN)
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file, after its header was checked against its size. Raises UserError."""

    def wrong(what: str) -> UserError:
        return UserError(what, where=str(path), do=_AGAIN)

    with _explained(path):
        total = size(path)
        length = int.from_bytes(read(path, 0, 8), "little")
        if total < 8 or length > min(total - 8, _MOST_HEADER):
            raise wrong(
                f"is truncated or no safetensors file: {total} bytes, a header of {length} is announced"
            )
        raw = read(path, 8, 8 + length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, value) for name, value in header.items()}
        ends = [8 + length + int(value["data_offsets"][1]) for value in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise wrong(f"its header is damaged ({type(e).__name__}: {e})") from e
    if max(ends, default=8 + length) != total:
        raise wrong(
            f"is truncated or altered: {total} bytes, its header says {max(ends, default=8 + length)}"
        )
    return entries


def _entry(path: Path, data: int, value: dict[str, Any]) -> Entry:
    """One tensor of a header. Raises ValueError where its numbers contradict each other."""
    first, end = (int(n) for n in value["data_offsets"])
    shape = tuple(int(n) for n in value["shape"])
    dtype = str(value["dtype"])
    if not 0 <= first <= end or any(n < 0 for n in shape):
        raise ValueError(f"offsets {first} to {end}, shape {shape}")
    if dtype in DTYPES and end - first != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{end - first} bytes for shape {shape} of {dtype}")
    return Entry(path, dtype, shape, data + first)
