"""Arguments are checked before anything is launched: a ValueError that names the argument, never a bad access."""

from __future__ import annotations

import torch
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1, set before triton is imported."""


def check(right: bool, argument: str, what: str) -> None:
    """Raises ValueError "argument: what" unless `right`."""
    if not right:
        raise ValueError(f"{argument} {what}")


def is_float(x: torch.Tensor, argument: str) -> None:
    """Raises ValueError unless `x` is of a dtype that all but the attention kernels take; fp64 is for tests."""
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    check(x.dtype in known, argument, f"is {x.dtype}, expected bfloat16, float16, float32 or float64")


def runs_here(x: torch.Tensor) -> None:
    """Raises ValueError when `x` is where no kernel runs: on a CPU without the interpreter."""
    check(
        x.is_cuda or INTERPRETED or x.is_meta or torch.compiler.is_compiling(),
        "the device",
        f"is {x.device}, and Triton needs a GPU (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests)",
    )
