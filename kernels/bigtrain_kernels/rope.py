"""Rotary positions for queries and keys: each pair (i, i + D/2) of a head turned by its angle (arXiv:2104.09864).

One pass over memory, in fp32 inside, rounded once. The backward pass is the same kernel with the angles reversed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bigtrain_kernels.checks import check, is_float, runs_here


@triton.jit
def rotate_rows(
    X, COS, SIN, OUT, sx, sxh, H, half, period, sign, HP: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """All heads of a token: OUT (T, H, 2 half) contiguous, COS and SIN (period, half); `sign` -1 turns back."""
    E: tl.constexpr = COS.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    h, i = tl.arange(0, HP)[:, None].to(tl.int64), tl.arange(0, HALF)[None, :]
    there = (h < H) & (i < half)
    angle = token % period * half + i
    cos = tl.load(COS + angle, mask=i < half, other=0.0)
    sin = tl.load(SIN + angle, mask=i < half, other=0.0) * sign
    a = tl.load(X + token * sx + h * sxh + i, mask=there, other=0.0).to(E)
    b = tl.load(X + token * sx + h * sxh + half + i, mask=there, other=0.0).to(E)
    out = OUT + token * H * half * 2 + h * half * 2 + i
    tl.store(out, (a * cos - b * sin).to(OUT.dtype.element_ty), mask=there)
    tl.store(out + half, (b * cos + a * sin).to(OUT.dtype.element_ty), mask=there)


@torch.library.custom_op("bigtrain::rotate", mutates_args=())
def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    T, H, D = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty((T, H, D), dtype=x.dtype, device=x.device)
    if out.numel():
        half = D // 2
        rotate_rows[(T,)](
            x, cos.contiguous(), sin.contiguous(), out, *x.stride()[:2], H, half, len(cos), sign,
            HP=triton.next_power_of_2(H), HALF=triton.next_power_of_2(half), num_warps=4,
        )  # fmt: skip
    return out


@_rotate.register_fake
def _(x: Any, cos: Any, sin: Any, sign: Any) -> torch.Tensor:
    return x.new_empty(x.shape)  # type: ignore[no-any-return]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.sign = inputs[3]


def _backward(ctx: Any, d: torch.Tensor) -> tuple[Any, ...]:
    op: Any = _rotate
    return op(d, *ctx.saved_tensors, -ctx.sign), None, None, None


_rotate.register_autograd(_backward, setup_context=_remember)


def rotate_bytes(T: int, H: int, D: int, size: int) -> int:
    """Bytes read and written at least once, either way: x in and out, and the two fp32 tables."""
    return 2 * T * H * D * size + 4 * T * D


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (T, H, D), D even, by the angles whose cos and sin are (T, D / 2), which get no gradient.

    They are fp32 (fp64 with an x of fp64), and may be (P, D / 2) where they repeat every P tokens.
    Raises ValueError naming the argument.
    """
    check(x.ndim == 3, "x", f"has {x.ndim} dimensions, expected (T, H, D)")
    is_float(x, "x")
    check(x.shape[2] % 2 == 0, "x", f"has head dim {x.shape[2]}, expected an even one")
    for name, table in (("cos", cos), ("sin", sin)):
        T, half, shape = x.shape[0], x.shape[2] // 2, tuple(table.shape)
        fits = (
            len(shape) == 2 and shape[1] == half and shape == tuple(cos.shape) and T % max(1, shape[0]) == 0
        )
        check(fits, name, f"has shape {shape}, expected ({T}, {half}), or fewer rows that divide {T}")
        exact = torch.promote_types(x.dtype, torch.float32)
        check(table.dtype == exact, name, f"is {table.dtype}, expected {exact} with an x of {x.dtype}")
        check(table.device == x.device, name, f"is on {table.device}, x is on {x.device}")
    runs_here(x)
    op: Any = _rotate
    return op(x, cos, sin, 1.0)  # type: ignore[no-any-return]
