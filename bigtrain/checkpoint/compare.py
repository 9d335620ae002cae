"""What differs between two checkpoints, whatever layout each was written in: tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bigtrain.checkpoint.format import DTYPES, StoredTensor
from bigtrain.checkpoint.reader import Key, Opened, open_checkpoint, read_boxes
from bigtrain.logical import Piece, boxes_of_flat_range

# Elements of each side in memory at a time: 4 MiB of float32, 8 MiB of the float64 that it is compared in.
CHUNK = 2**20


@dataclass(frozen=True)
class Difference:
    """How far one logical tensor, which both have in one shape, is apart."""

    kind: str
    name: str
    elements: int
    unequal: int
    """Elements whose bits differ (whose values differ, between two dtypes)."""
    largest: float
    """Largest absolute difference of two elements; infinite where a NaN or an infinity faces something else."""
    relative: float
    """Norm of the difference over the norm of the first; infinite when only the first is zero."""


@dataclass(frozen=True)
class Comparison:
    """Two checkpoints side by side."""

    paths: tuple[str, str]
    steps: tuple[int, int]
    state: dict[str, tuple[Any, Any]]
    """Dotted key -> what each has (None: it does not have it), of those that differ."""
    only_first: list[StoredTensor]
    only_second: list[StoredTensor]
    unlike: list[tuple[StoredTensor, StoredTensor]]
    """Tensors of both whose shape or dtype differs."""
    differences: list[Difference]
    """Tensors of both in one shape whose numbers differ, worst first."""
    compared: int
    """Tensors of both in one shape."""

    @property
    def same_tensors(self) -> bool:
        """Whether they hold the same tensors, equal to the bit."""
        return not (self.only_first or self.only_second or self.unlike or self.differences)

    @property
    def equal(self) -> bool:
        """Whether they hold the same. The layout is how they were written, not what they hold: it may differ."""
        held = [key for key in self.state if key.split(".")[0] != "layout"]
        return self.same_tensors and self.steps[0] == self.steps[1] and not held

    def __str__(self) -> str:
        """A paragraph, then one line for each thing that differs."""
        a, b = self.steps
        lines = [
            f"first       {self.paths[0]}",
            f"second      {self.paths[1]}",
            f"step        {a:,}" + ("" if a == b else f" and {b:,}"),
            *(f"state       {key}: {_shown(x)} and {_shown(y)}" for key, (x, y) in self.state.items()),
            *(f"only first  {_tensor(t)}" for t in self.only_first),
            *(f"only second {_tensor(t)}" for t in self.only_second),
            *(f"unlike      {_tensor(x)} and {y.dtype} {_shape(y)}" for x, y in self.unlike),
        ]
        if not self.differences:
            return "\n".join([*lines, f"tensors     {self._verdict()}"])
        lines += [f"tensors     {self._verdict()}; worst first:", ""]
        width = max(len(f"{d.kind} of {d.name}") for d in self.differences)
        lines.append(f"{'':<{width}}  {'largest':>10}  {'relative':>10}  unequal elements")
        for d in self.differences:
            shown = f"{d.largest:>10.3e}  {d.relative:>10.3e}  {d.unequal:,} of {d.elements:,}"
            lines.append(f"{d.kind + ' of ' + d.name:<{width}}  {shown}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.compared:
            return "none to compare"
        if not self.differences:
            rest = "" if self.same_tensors else " in both"
            return f"all {self.compared:,}{rest} are equal to the bit"
        return f"{len(self.differences):,} of {self.compared:,} in both differ"

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs. Numbers that JSON does not know are null."""
        return {
            "paths": list(self.paths),
            "equal": self.equal,
            "same_tensors": self.same_tensors,
            "steps": list(self.steps),
            "state": {key: list(both) for key, both in self.state.items()},
            "only_first": [vars(t) for t in self.only_first],
            "only_second": [vars(t) for t in self.only_second],
            "unlike": [[vars(x), vars(y)] for x, y in self.unlike],
            "compared": self.compared,
            "differences": [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(d).items()}
                for d in self.differences
            ],
        }


def compare(first: str, second: str) -> Comparison:
    """Read both checkpoints, checksums included, a few blocks at a time. Raises DamagedError naming the file."""
    a, b = open_checkpoint(first), open_checkpoint(second)
    tensors_a, tensors_b = _tensors(a), _tensors(b)
    both = [(t, tensors_b[key]) for key, t in tensors_a.items() if key in tensors_b]
    alike = [(x, y) for x, y in both if x.shape == y.shape]
    differences = [d for x, y in alike if (d := _difference(a, x, b, y)).unequal]
    return Comparison(
        paths=(str(a.path), str(b.path)),
        steps=(a.manifest.step, b.manifest.step),
        state=_state_differences(a.manifest.state, b.manifest.state),
        only_first=[t for key, t in tensors_a.items() if key not in tensors_b],
        only_second=[t for key, t in tensors_b.items() if key not in tensors_a],
        unlike=[(x, y) for x, y in both if (x.shape, x.dtype) != (y.shape, y.dtype)],
        differences=sorted(differences, key=lambda d: (-d.relative, -d.largest, d.kind, d.name)),
        compared=len(alike),
    )


def _tensors(opened: Opened) -> dict[Key, StoredTensor]:
    return {(t.kind, t.name): t for t in opened.manifest.tensors}


def _difference(a: Opened, x: StoredTensor, b: Opened, y: StoredTensor) -> Difference:
    """Compare one tensor, CHUNK elements at a time, in float64."""
    total = math.prod(x.shape)
    unequal, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for start in range(0, total, CHUNK):
        count = min(CHUNK, total - start)
        left, right = _read(a, x, start, count), _read(b, y, start, count)
        equal = _same_bits(left, right)
        left, right = left.double(), right.double()
        # Bits that agree are no difference, also where they say NaN; a NaN against a number is an infinite one.
        apart = (left - right).abs().nan_to_num_(nan=math.inf, posinf=math.inf).masked_fill_(equal, 0.0)
        unequal += count - int(equal.sum())
        largest = max(largest, float(apart.max()))
        squares += float(apart.square().sum())
        norm += float(left.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum())
    relative = math.sqrt(squares / norm) if norm else math.inf if squares else 0.0
    return Difference(x.kind, x.name, total, unequal, largest, relative)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Which elements agree to the bit (between two dtypes: in value)."""
    if left.dtype != right.dtype:
        return left.double() == right.double()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.view(whole) == right.view(whole)


def _read(opened: Opened, tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
    """`count` elements of a tensor in row-major order from element `start`."""
    flat = torch.empty(count, dtype=DTYPES[tensor.dtype])
    pieces = [
        Piece(tensor.kind, tensor.name, tensor.shape, box.offset, _part(flat, box.start - start, box.sizes))
        for box in boxes_of_flat_range(tensor.shape, start, count)
    ]
    read_boxes(opened, pieces, verify=True)
    return flat


def _part(flat: torch.Tensor, start: int, sizes: tuple[int, ...]) -> torch.Tensor:
    return flat[start : start + math.prod(sizes)].view(sizes)


def _state_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys under which two states hold different values."""
    flat_a, flat_b = dict(_flat(a)), dict(_flat(b))
    keys = dict.fromkeys([*flat_a, *flat_b])
    found = {key: (flat_a.get(key), flat_b.get(key)) for key in keys}
    return {key: (x, y) for key, (x, y) in found.items() if x != y or (key in flat_a) != (key in flat_b)}


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def _shown(value: Any) -> str:
    """A value in at most a line."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _tensor(tensor: StoredTensor) -> str:
    return f"{tensor.kind} of {tensor.name}: {tensor.dtype} {_shape(tensor)}"


def _shape(tensor: StoredTensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
