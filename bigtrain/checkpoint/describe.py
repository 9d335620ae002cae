"""What is in a checkpoint, for people and programs: step, tensors, sizes, layout, health."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.format import DTYPES, StoredTensor, read_manifest
from bigtrain.checkpoint.location import bytes_under, place
from bigtrain.checkpoint.reader import verify_checkpoint


@dataclass(frozen=True)
class Description:
    """A checkpoint's contents."""

    path: Path
    step: int
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    state: dict[str, Any]
    """What the run saved beside the tensors."""
    tensors: tuple[StoredTensor, ...]
    elements: dict[str, int]
    """Elements of each kind: master is the number of parameters."""
    bytes: int
    """Of all files, manifest included."""
    writers: int
    """Ranks that wrote it."""
    problems: list[str]
    """One sentence for each damaged file; empty when sound."""
    verified: bool
    """Whether all data was read and checked, or manifest, indexes and sizes only."""

    def __str__(self) -> str:
        """A short paragraph."""
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.elements.items())
        health = "sound" if self.verified else "sound by manifest, indexes and sizes (--verify reads all)"
        lines = [
            f"checkpoint  {self.path}",
            f"step        {self.step:,}, written {self.created} by {_versions(self.versions)}",
            *(f"progress    {_flat(progress)}" for progress in [self.state.get("progress")] if progress),
            f"tensors     {len(self.tensors):,} ({kinds})",
            f"on disk     {self.bytes / 1e6:,.1f} MB in {self.writers} data files",
            *(f"layout      {_flat(layout)}" for layout in [self.state.get("layout")] if layout),
            *(f"DAMAGED     {problem}" for problem in self.problems),
        ]
        return "\n".join(lines if self.problems else [*lines, f"health      {health}"])

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        tensors = [vars(t) for t in self.tensors]
        return {**vars(self), "path": str(self.path), "tensors": tensors, "sound": not self.problems}


def describe(path: str | Path, *, verify: bool = False) -> Description:
    """Read the manifest; check the indexes, or `verify` every byte. DamagedError without a manifest."""
    path = place(path)
    manifest = read_manifest(path)
    elements: dict[str, int] = {}
    for tensor in manifest.tensors:
        elements[tensor.kind] = elements.get(tensor.kind, 0) + math.prod(tensor.shape)
    return Description(
        path=path,
        step=manifest.step,
        created=manifest.created,
        versions=manifest.versions,
        state=manifest.state,
        tensors=manifest.tensors,
        elements=elements,
        bytes=bytes_under(path),
        writers=len(manifest.files),
        problems=verify_checkpoint(path, data=verify),
        verified=verify,
    )


def tensor_lines(description: Description) -> list[str]:
    """One line a logical tensor, its kinds together: name, shape, dtype and bytes."""
    rows: dict[tuple[str, tuple[int, ...]], list[StoredTensor]] = {}
    for tensor in description.tensors:
        rows.setdefault((tensor.name, tensor.shape), []).append(tensor)
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for (name, shape), kinds in rows.items():
        size = sum(math.prod(shape) * DTYPES[t.dtype].itemsize for t in kinds)
        shown = "x".join(map(str, shape)) or "scalar"
        what = ", ".join(f"{t.kind} {t.dtype}" for t in kinds)
        lines.append(f"{name:<{width}}  {shown:>14}  {size / 1e6:>10,.3f} MB  {what}")
    return lines


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _flat(layout: Any) -> str:
    if isinstance(layout, dict):
        return ", ".join(f"{key} {value}" for key, value in layout.items())
    return str(layout)
