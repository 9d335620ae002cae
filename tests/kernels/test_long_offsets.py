"""Tensors of more than 2^31 elements: the programs at their ends, in the interpreter, where no other page is touched.

The launches are the kernels' own with programs numbered from far on; each is compared with the same launch on a small
copy of the end. Attention has a test of its own, by strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton.language as tl
from bigtrain_kernels import adamw, cross_entropy_kernels, norm, rope, swiglu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's programs are renumbered")
W = 64
"""Elements of a row, or of a program."""
FAR = 2**31 // W
"""Rows before the end."""


@contextmanager
def numbered_from(first: int) -> Iterator[None]:
    """Programs of a grid of n have the numbers first .. first + n - 1."""
    from triton.runtime.interpreter import InterpreterBuilder

    builder: Any = InterpreterBuilder
    before = builder.set_grid_idx

    def shifted(self: Any, x: int, y: int, z: int) -> None:
        self.grid_idx = (x + first, y, z)

    builder.set_grid_idx = shifted
    try:
        yield
    finally:
        builder.set_grid_idx = before


def numbers(rows: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(far: int, dtype: torch.dtype, seed: int, width: int = W) -> torch.Tensor:
    """(far + 2, width), of which only the last two rows exist."""
    x = torch.empty(far + 2, width, dtype=dtype)
    x[far:] = numbers(2, width, dtype, seed)
    return x


def run_norm(far: int) -> list[torch.Tensor]:
    shape: Any = {"ROWS": 1, "BLOCK": W, "ADD": True, "CENTER": True, "SHIFT": True}
    x, r, y, total = (ends(far, torch.bfloat16, i) for i in range(4))
    mean, scale = (ends(far, torch.float32, i, 1) for i in range(2))
    weight, bias = numbers(2, W, torch.bfloat16, 7)
    dx = ends(far, torch.bfloat16, 8)
    parts = [ends(far, torch.float32, i) for i in range(2)]
    with numbered_from(far):
        norm.norm_forward[(2,)](x, r, weight, bias, y, total, mean, scale, 1e-6, far + 2, W, **shape)
    with numbered_from(far + 1):
        norm.norm_backward[(1,)](r, y, x, weight, mean, scale, dx, *parts, far + 2, W, **shape)
    return [y, total, mean, scale, dx, *parts]


def run_swiglu(far: int) -> list[torch.Tensor]:
    gate, up, out, dgate, dup = (ends(far, torch.bfloat16, i) for i in range(5))
    count = (far + 2) * W
    with numbered_from(far):
        swiglu.swiglu_forward[(2,)](gate, up, out, count, BLOCK=W)
        swiglu.swiglu_backward[(2,)](out, gate, up, dgate, dup, count, BLOCK=W)
    return [out, dgate, dup]


def run_rotate(far: int) -> list[torch.Tensor]:
    x, out = ends(far, torch.bfloat16, 0), ends(far, torch.bfloat16, 1)
    cos, sin = (numbers(1, W // 2, torch.float32, i) for i in range(2))
    with numbered_from(far):
        rope.rotate_rows[(2,)](x, cos, sin, out, W, W, 1, W // 2, 1, 1.0, HP=1, HALF=W // 2)
    return [out]


def run_cross_entropy(far: int) -> list[torch.Tensor]:
    logits, out = ends(far, torch.bfloat16, 0), ends(far, torch.bfloat16, 1)
    targets = torch.empty(far + 2, dtype=torch.int64)
    targets[far:] = 5
    sums = [ends(far, torch.float32, i, 1) for i in range(4)]
    lse, weight = (ends(far, torch.float32, i, 1) for i in (5, 6))
    with numbered_from(far):
        cross_entropy_kernels.row_sums[(2,)](logits, targets, *sums, W, W, 0, 0.0, BLOCK=W, CAP=False)
        cross_entropy_kernels.gradient[(2,)](
            logits, targets, lse, weight, out, W, W, W, 0, W, 0.0, 0.1, 1e-4, BLOCK=W, CAP=False
        )
    return [out, *sums]


def run_adamw(far: int) -> list[torch.Tensor]:
    x = ends(far, torch.float32, 0)
    x[far:] = x[far:].abs()
    table = torch.tensor([[x.data_ptr()] * 5 + [x.numel()]])
    blocks = torch.tensor([[0, far], [0, far + 1]], dtype=torch.int32)
    adamw.adamw_step[(2,)](
        table, blocks, table, 0.9, 0.1, 0.9, 0.95, 0.1, 0.05, 0.5, 1e-8, BLOCK=W, P=tl.float32, G=tl.float32,
        L=tl.float32, COPY=False, CLIP=False, ALIGNED=True,
    )  # fmt: skip
    return [x]


@pytest.mark.parametrize("run", [run_norm, run_swiglu, run_rotate, run_cross_entropy, run_adamw])
def test_the_ends_of_long_tensors(run: Any) -> None:
    for long, short in zip(run(FAR), run(0), strict=True):
        assert torch.equal(long[FAR:], short)
