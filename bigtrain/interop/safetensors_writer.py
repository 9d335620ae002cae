"""Write a model as safetensors, tensor by tensor, straight from a checkpoint's fp32 masters.

The library's save_file wants all tensors in memory at once. The format is 8 bytes of header length, a JSON header
and raw bytes at offsets that follow from the shapes, so it is streamed here: beyond the reader's blocks it takes
SLAB bytes, for matrices that the family keeps transposed or fused (GPT-2) one of them whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch

from bigtrain.checkpoint.boxes import Index
from bigtrain.checkpoint.reader import Opened, read_boxes
from bigtrain.data.files import disk_errors
from bigtrain.errors import UserError
from bigtrain.interop.names import Names, Shapes, foreign_shapes
from bigtrain.interop.safetensors_reader import INDEX, SINGLE
from bigtrain.logical import Piece

DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}
SLAB = 32 << 20
"""Bytes of fp32 rows read at a time."""
ALIGNMENT = 8
"""The data begins at a multiple of this (the format's rule; padded with spaces)."""


@dataclass(frozen=True)
class Export:
    """What is written: the checkpoint's parameters under foreign names, in one dtype."""

    opened: Opened
    names: Names
    shapes: Shapes
    dtype: str
    """fp32, bf16 or fp16."""
    verify: bool = True

    @cached_property
    def tensors(self) -> dict[str, Index]:
        """Foreign tensors and their shapes, in the order in which they are written."""
        return foreign_shapes(self.names, self.shapes)

    def bytes_of(self, shape: Index) -> int:
        """Bytes of a tensor in the file."""
        return math.prod(shape) * DTYPES[self.dtype][1].itemsize

    def slabs(self, tensor: str) -> Iterator[torch.Tensor]:
        """A foreign tensor's values in `dtype`, contiguous, some whole rows at a time.

        Raises UserError when a value is beyond what fp16 can hold.
        """
        parts = [(name, source) for name, source in self.names.items() if source.tensor == tensor]
        parts.sort(key=lambda part: part[1].start)
        if len(parts) == 1 and not parts[0][1].transposed:
            name = parts[0][0]
            rows = self.shapes[name][0]
            row_bytes = 4 * math.prod(self.shapes[name][1:])
            height = max(1, SLAB // row_bytes)
            for top in range(0, rows, height):
                yield self._cast(tensor, self._rows(name, top, min(height, rows - top)))
            return
        whole = [self._rows(name, 0, self.shapes[name][0]) for name, _ in parts]
        turned = [w.t() if source.transposed else w for w, (_, source) in zip(whole, parts, strict=True)]
        yield self._cast(tensor, torch.cat(turned, dim=-1))

    def _rows(self, name: str, top: int, count: int) -> torch.Tensor:
        shape = self.shapes[name]
        out = torch.empty(count, *shape[1:])
        piece = Piece("master", name, shape, (top, *(0 for _ in shape[1:])), out)
        read_boxes(self.opened, [piece], verify=self.verify)
        return out

    def _cast(self, tensor: str, values: torch.Tensor) -> torch.Tensor:
        cast = values.to(DTYPES[self.dtype][1]).contiguous()
        if self.dtype == "fp16" and not bool(cast.isfinite().all()) and bool(values.isfinite().all()):
            raise UserError(
                f"{tensor} has values up to {values.abs().max():.3g}, fp16 ends at 65504",
                where="--dtype",
                do="export as bf16 or fp32",
            )
        return cast


def shards_of(export: Export, most: int) -> list[list[str]]:
    """The tensors of each file: filled in order up to `most` bytes; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in export.tensors.items():
        more = export.bytes_of(shape)
        if shards[-1] and size + more > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def write_safetensors(export: Export, folder: Path, most: int) -> list[Path]:
    """Write one file, or several of at most `most` bytes of data and their index; returns them.

    Raises UserError for values that the dtype cannot hold, RunError when the disk is full, DamagedError when the
    checkpoint is.
    """
    shards = shards_of(export, most)
    count = len(shards)
    files = [
        folder / (SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors")
        for i in range(1, count + 1)
    ]
    for path, names in zip(files, shards, strict=True):
        with disk_errors(path), path.open("wb") as f:
            _write_file(export, names, f)
            f.flush()
            os.fsync(f.fileno())
    if count == 1:
        return files
    total = sum(export.bytes_of(shape) for shape in export.tensors.values())
    where = {name: path.name for path, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    with disk_errors(folder / INDEX):
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*files, folder / INDEX]


def _write_file(export: Export, names: list[str], f: BinaryIO) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    at = 0
    for name in names:
        shape = export.tensors[name]
        size = export.bytes_of(shape)
        header[name] = {"dtype": DTYPES[export.dtype][0], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    f.write(len(raw).to_bytes(8, "little") + raw)
    for name in names:
        for slab in export.slabs(name):
            f.write(slab.view(-1).view(torch.uint8).numpy().data)
