"""What a checkpoint is on disk: one data file a rank, and a manifest that makes them a checkpoint.

    step_00001000/
        rank_00000.bin    boxes as raw little-endian bytes, each at a multiple of 64; then their JSON index:
        rank_00001.bin    kind, logical name and shape, box, dtype, place, CRC-32 of every 4 MiB
        manifest.json     written last: step, tensors, files (size, CRC-32 of the index), the run's state

In an object store the data files lie one folder deeper, in one of each save's own (bigtrain.checkpoint.objects).

The manifest carries its own CRC-32, the manifest checks the indexes and the indexes check the data, so that a
flip of any bit is found by whoever reads that part (up to 63 bytes of padding before a box hold nothing).
Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.boxes import Box, Index
from bigtrain.checkpoint.location import out_of_reach, read, reason, remote, size
from bigtrain.errors import BigtrainError, RunError, UserError

MANIFEST = "manifest.json"
VERSION = 1
ALIGNMENT = 64
BLOCK = 4 * 2**20
"""Bytes under one CRC-32: what must be read to trust one element, and the loader's buffer."""

DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


class DamagedError(RunError):
    """A file of a checkpoint is missing, torn or altered. Another checkpoint may be sound."""


def unreadable(e: OSError, path: Path) -> BigtrainError:
    """The error for a file that cannot be read: damage, unless its store is out of reach and all may be sound."""
    if remote(path) and not isinstance(e, FileNotFoundError):
        return out_of_reach(e, path)
    return DamagedError(f"cannot be read: {reason(e)}", where=str(path))


def step_name(step: int) -> str:
    """Folder of a step's checkpoint: step_00001000."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder name, None for anything else (drafts included)."""
    found = re.fullmatch(r"step_(\d{8,})", name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor as the manifest lists it."""

    kind: str
    name: str
    shape: Index
    dtype: str


@dataclass(frozen=True)
class StoredBox:
    """One box of a logical tensor in a data file: `start` in bytes, one CRC-32 for every BLOCK bytes."""

    tensor: StoredTensor
    box: Box
    start: int
    crcs: tuple[int, ...]

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.tensor.dtype].itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the box."""
        return self.box.elements * self.item


@dataclass(frozen=True)
class StoredFile:
    """A rank's data file. Its index is the JSON from `index_start` to the end."""

    name: str
    rank: int
    bytes: int
    index_start: int
    index_crc32: int


@dataclass(frozen=True)
class Manifest:
    """What makes a folder a checkpoint."""

    step: int
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """Of bigtrain, torch and Python, when it was written."""
    state: dict[str, Any]
    """The run's own JSON: progress, optimizer extra, config, layout."""
    tensors: tuple[StoredTensor, ...]
    files: tuple[StoredFile, ...]


def index_bytes(step: int, rank: int, boxes: list[StoredBox]) -> bytes:
    """The JSON index at the end of a data file."""
    rows = [
        {
            **vars(stored.tensor),
            "offset": stored.box.offset,
            "sizes": stored.box.sizes,
            "start": stored.start,
            "bytes": stored.bytes,
            "crc32": stored.crcs,
        }
        for stored in boxes
    ]
    body = {"version": VERSION, "step": step, "rank": rank, "block": BLOCK, "boxes": rows}
    return json.dumps(body, separators=(",", ":")).encode()


def read_index(folder: Path, file: StoredFile, step: int) -> list[StoredBox]:
    """The boxes of one data file, checked against the manifest's size and checksum. Raises DamagedError."""
    path = folder / file.name
    try:
        raw = read(path, file.index_start, file.bytes + 1)  # one more tells whether it is longer
        if file.index_start + len(raw) != file.bytes:
            raise DamagedError(f"has {size(path)} bytes, its manifest says {file.bytes}", where=str(path))
    except OSError as e:
        raise unreadable(e, path) from e
    if zlib.crc32(raw) != file.index_crc32:
        raise DamagedError("its index does not match the manifest's checksum", where=str(path))
    body = json.loads(raw)
    if (body["step"], body["rank"]) != (step, file.rank):
        raise DamagedError(f"belongs to rank {body['rank']} of step {body['step']}", where=str(path))
    return [
        StoredBox(
            StoredTensor(row["kind"], row["name"], tuple(row["shape"]), row["dtype"]),
            Box(tuple(row["offset"]), tuple(row["sizes"])),
            row["start"],
            tuple(row["crc32"]),
        )
        for row in body["boxes"]
    ]


_SEAL = b'{"crc32": "%08x",'


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as JSON, its first entry the CRC-32 of all bytes with that number taken as zero."""
    lists = {"tensors": [vars(t) for t in manifest.tensors], "files": [vars(f) for f in manifest.files]}
    text = json.dumps({"version": VERSION, **vars(manifest), **lists}, indent=1).encode() + b"\n"
    rest = text.removeprefix(b"{")
    return _SEAL % zlib.crc32(_SEAL % 0 + rest) + rest


def read_manifest(folder: Path) -> Manifest:
    """A checkpoint's manifest. Raises DamagedError when it is missing or altered, UserError when it is too
    new."""
    path = folder / MANIFEST
    try:
        raw = read(path)
    except OSError as e:
        raise unreadable(e, path) from e
    rest = raw[len(_SEAL % 0) :]
    if raw != _SEAL % zlib.crc32(_SEAL % 0 + rest) + rest:
        raise DamagedError("does not match its own checksum", where=str(path))
    body = json.loads(raw)
    if body["version"] > VERSION:
        raise UserError(
            f"is of format {body['version']}; this bigtrain reads up to {VERSION}",
            where=str(path),
            do="use the newer bigtrain that wrote it",
        )
    if step_of(folder.name) not in (None, body["step"]):
        raise DamagedError(f"belongs to step {body['step']}", where=str(path))
    return Manifest(
        step=body["step"],
        created=body["created"],
        versions=body["versions"],
        state=body["state"],
        tensors=tuple(StoredTensor(**{**t, "shape": tuple(t["shape"])}) for t in body["tensors"]),
        files=tuple(StoredFile(**f) for f in body["files"]),
    )


def write_synced(path: Path, content: bytes) -> None:
    """Write a whole file and wait until it is on the disk."""
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (files created, renamed, removed) are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
