"""What benchmarks/kernels.py measures: one piece of work, ours and every peer that can do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class KernelCase:
    """One shape of one piece of work."""

    name: str
    work: int
    """Floating-point operations or bytes, by the formula that holds for every implementation."""
    unit: str
    """"TFLOP/s" or "GB/s": what `work` over the time is told in."""
    prepare: Callable[[int], dict[str, Run]]
    """Fresh random inputs from a seed, and each implementation ready to be timed on them; ours begin with "bigtrain".
    One that this machine lacks is left out; one that fails raises when it is run.
    """
    check: Callable[[int], float]
    """Ours against float64 on smaller fresh inputs, outputs poisoned: the error over what is allowed, at most 1."""
    aims: dict[str, float] = field(default_factory=dict)
    """By the name of a peer: how many times as fast ours should be."""


def poison(device: torch.device | str = "cuda", size: int = 1 << 24) -> None:
    """Leave NaN in the memory that the next outputs get: what a kernel does not write shows."""
    blocks = [
        torch.full((size // 16 >> i,), torch.nan, dtype=torch.float32, device=device) for i in range(12)
    ]
    del blocks
