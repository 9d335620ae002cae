"""Load a checkpoint of any layout into any other: intersect boxes, read and check only the needed blocks."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.boxes import Box, flat_hull, intersection
from bigtrain.checkpoint.format import (
    BLOCK,
    DTYPES,
    DamagedError,
    Manifest,
    StoredBox,
    read_index,
    read_manifest,
    unreadable,
)
from bigtrain.checkpoint.location import Fill, place, reading, remote
from bigtrain.errors import UserError
from bigtrain.logical import Logical, Piece, boxes_of_flat_range
from bigtrain.mesh import Mesh
from bigtrain.place import Place

Key = tuple[str, str]
"""Kind and logical name."""

# Threads that read, check and copy blocks; each holds one block of BLOCK bytes.
READERS = min(4, os.cpu_count() or 1)
# A store answers a request after some 50 ms, whatever the cores: only many at a time fill the line.
REMOTE_READERS = 16


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose manifest, file sizes and indexes are sound; the data itself is checked when read."""

    path: Path
    manifest: Manifest
    boxes: dict[Key, list[tuple[str, StoredBox]]] = field(repr=False)
    """Where every logical tensor's boxes lie: file name and box."""


def open_checkpoint(path: str | Path) -> Opened:
    """Read and check manifest and indexes. Raises DamagedError naming the file."""
    path = place(path)
    manifest = read_manifest(path)
    boxes: dict[Key, list[tuple[str, StoredBox]]] = defaultdict(list)
    with ThreadPoolExecutor(_readers(path)) as pool:
        indexes = pool.map(lambda file: read_index(path, file, manifest.step), manifest.files)
        for file, index in zip(manifest.files, indexes, strict=True):
            for stored in index:
                boxes[stored.tensor.kind, stored.tensor.name].append((file.name, stored))
    return Opened(path, manifest, dict(boxes))


def _readers(path: Path) -> int:
    return REMOTE_READERS if remote(path) else READERS


def load(
    path: str | Path,
    pieces: Iterable[Piece],
    *,
    verify: bool = True,
    cast: bool = False,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Fill every piece from the checkpoint and return the run's state.

    With `mesh` it is collective: the pieces of all ranks together must be the whole checkpoint, and an error
    on one rank is raised on all. Without it, these pieces alone must. `cast` allows another dtype than the
    stored one.

    Raises UserError listing every tensor that is missing, extra or of another shape; DamagedError when a file
    is.
    """
    wanted = list(pieces)
    alone = mesh or Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)
    opened: list[Opened] = []

    def compare() -> tuple[list[str], bytes]:
        opened.append(open_checkpoint(path))
        tensors = opened[0].manifest.tensors
        needed = {(p.kind, p.name) for p in wanted}
        # One byte a tensor: what every rank tells every other must stay small.
        return _problems(opened[0], wanted, cast), bytes((t.kind, t.name) in needed for t in tensors)

    answers = together(alone, compare)
    found = sorted({problem for problems, _ in answers for problem in problems})
    for tensor, used in zip(
        opened[0].manifest.tensors, zip(*(u for _, u in answers), strict=True), strict=True
    ):
        if not any(used):
            found.append(f"{tensor.kind} of {tensor.name}: in the checkpoint only")
    if found:
        raise _mismatch(opened[0], found)
    together(alone, lambda: read_boxes(opened[0], wanted, verify=verify))
    return opened[0].manifest.state


def load_weights(path: str | Path, model: torch.nn.Module, *, verify: bool = True) -> dict[str, Any]:
    """Fill a model's parameters from the fp32 masters, cast to their dtype; returns the run's state.

    Optimizer states are neither needed nor read; beyond the model it takes READERS x BLOCK bytes. Raises as
    `load`.
    """
    pieces = []
    for name, parameter in model.named_parameters():
        whole = Logical.whole(name, parameter.shape)
        record: Logical = getattr(parameter, "logical", whole)
        pieces.append(Piece("master", record.name, record.shape, record.offset, parameter.data))
    opened = open_checkpoint(path)
    names = {p.name for p in pieces}
    found = _problems(opened, pieces, cast=True)
    found += [
        f"master of {t.name}: in the checkpoint only"
        for t in opened.manifest.tensors
        if t.kind == "master" and t.name not in names
    ]
    if found:
        raise _mismatch(opened, found)
    read_boxes(opened, pieces, verify=verify)
    return opened.manifest.state


def _problems(opened: Opened, pieces: Sequence[Piece], cast: bool) -> list[str]:
    """What these pieces need and the checkpoint does not have."""
    stored = {(t.kind, t.name): t for t in opened.manifest.tensors}
    found: dict[str, None] = {}
    for piece in pieces:
        tensor = stored.get((piece.kind, piece.name))
        label = f"{piece.kind} of {piece.name}"
        dtype = str(piece.tensor.dtype).removeprefix("torch.")
        if tensor is None:
            found[f"{label}: not in the checkpoint"] = None
        elif tensor.shape != tuple(piece.shape):
            found[f"{label}: shape {tensor.shape} in the checkpoint, {tuple(piece.shape)} wanted"] = None
        elif not cast and tensor.dtype != dtype:
            found[f"{label}: {tensor.dtype} in the checkpoint, {dtype} wanted"] = None
    return list(found)


def _mismatch(opened: Opened, found: list[str], most: int = 20) -> UserError:
    """One error for all differences; says whether the model or only the optimizer differs."""
    other = "model" if any(line.startswith("master ") for line in found) else "optimizer"
    lines = found[:most] + ([f"and {len(found) - most} more"] if len(found) > most else [])
    word = "difference" if len(found) == 1 else "differences"
    return UserError(
        f"is a checkpoint of another {other} ({len(found)} {word})\n    " + "\n    ".join(lines),
        where=str(opened.path),
        do=f"use the config the checkpoint was trained with, or start another run for this {other}",
    )


def read_boxes(opened: Opened, pieces: Sequence[Piece], *, verify: bool) -> None:
    """Copy every piece's elements from the data files, each block read once. Raises DamagedError."""
    jobs: dict[str, dict[int, tuple[StoredBox, list[Piece]]]] = defaultdict(dict)
    for piece in pieces:
        left = piece.tensor.numel()
        for name, stored in opened.boxes.get((piece.kind, piece.name), []):
            overlap = intersection(stored.box, _box(piece))
            if overlap is not None:
                left -= overlap.elements
                jobs[name].setdefault(stored.start, (stored, []))[1].append(piece)
        if left:
            raise DamagedError(f"{piece.kind} of {piece.name} is not whole", where=str(opened.path))
    for name, boxes in sorted(jobs.items()):
        path = opened.path / name
        tasks = [
            (stored, number, targets)
            for _, (stored, targets) in sorted(boxes.items())
            for number in _needed(stored, targets)
        ]
        _run(tasks, path, verify)


def _box(piece: Piece) -> Box:
    return Box(tuple(piece.offset), tuple(piece.tensor.shape))


def _needed(stored: StoredBox, targets: Sequence[Piece]) -> list[int]:
    """Numbers of the blocks of a stored box that hold anything the targets need."""
    count = BLOCK // stored.item
    numbers: set[int] = set()
    for piece in targets:
        overlap = intersection(stored.box, _box(piece))
        assert overlap is not None, "targets were chosen by their overlap"
        first, end = flat_hull(overlap, stored.box)
        numbers.update(range(first // count, -(-end // count)))
    return sorted(numbers)


Task = tuple[StoredBox, int, list[Piece]]


def _run(tasks: Sequence[Task], path: Path, verify: bool) -> None:
    """Do the block tasks of one file on several threads; the first error in file order is raised."""
    try:
        with reading(path) as fill:
            _share(tasks, fill, path, verify)
    except OSError as e:
        raise unreadable(e, path) from e


def _share(tasks: Sequence[Task], fill: Fill, path: Path, verify: bool) -> None:
    """Deal the tasks to threads; few are not worth any in a file, where a block comes at once."""

    def work(share: Sequence[Task]) -> None:
        buffer = torch.empty(BLOCK, dtype=torch.uint8)
        for stored, number, targets in share:
            _read_block(fill, path, stored, number, targets, buffer, verify)

    readers = min(_readers(path), len(tasks))
    if len(tasks) < 2 * READERS and not remote(path):
        work(tasks)
        return
    with ThreadPoolExecutor(max(readers, 1)) as pool:
        list(pool.map(work, [tasks[i::readers] for i in range(readers)]))


def _read_block(
    fill: Fill,
    path: Path,
    stored: StoredBox,
    number: int,
    targets: Sequence[Piece],
    buffer: torch.Tensor,
    verify: bool,
) -> None:
    """Read one block, check it, copy the parts that the targets need."""
    size = min(BLOCK, stored.bytes - number * BLOCK)
    raw = buffer[:size]
    view = memoryview(raw.numpy().data)
    if fill(view, stored.start + number * BLOCK) != size:
        raise DamagedError(f"ends inside {stored.tensor.kind} of {stored.tensor.name}", where=str(path))
    if verify and zlib.crc32(view) != stored.crcs[number]:
        raise DamagedError(
            f"{stored.tensor.kind} of {stored.tensor.name} does not match its checksum "
            f"(bytes {stored.start + number * BLOCK} to {stored.start + number * BLOCK + size})",
            where=str(path),
        )
    flat = raw.view(DTYPES[stored.tensor.dtype])
    start = number * BLOCK // stored.item
    for part in boxes_of_flat_range(stored.box.sizes, start, len(flat)):
        offset = tuple(a + b for a, b in zip(stored.box.offset, part.offset, strict=True))
        box = Box(offset, part.sizes)
        source = flat[part.start - start : part.start - start + box.elements].view(box.sizes)
        for piece in targets:
            overlap = intersection(box, _box(piece))
            if overlap is not None:
                target = piece.tensor.detach()[overlap.within(tuple(piece.offset))]
                target.copy_(source[overlap.within(box.offset)])


def verify_checkpoint(path: Path, *, data: bool = True) -> list[str]:
    """Read every byte of a checkpoint; one sentence for each file that is not as it was written.

    Without `data` only the manifest, the indexes and with them the sizes.
    """
    try:
        manifest = read_manifest(path)
    except DamagedError as e:
        return [str(e)]
    problems: list[str] = []
    for file in manifest.files:
        try:
            boxes = read_index(path, file, manifest.step)
            blocks: list[Task] = [(stored, i, []) for stored in boxes for i in range(len(stored.crcs))]
            _run(blocks if data else [], path / file.name, verify=True)
        except DamagedError as e:
            problems.append(str(e))
    return problems
