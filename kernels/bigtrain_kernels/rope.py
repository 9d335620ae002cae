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
    X, COS, SIN, OUT, sx, sxh, H, half, sign, HP: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """All heads of a token: OUT (T, H, 2 half) contiguous, COS and SIN (T, half) fp32; `sign` -1 turns back."""
    token = tl.program_id(0).to(tl.int64)
    h, i = tl.arange(0, HP)[:, None], tl.arange(0, HALF)[None, :]
    there = (h < H) & (i < half)
    cos = tl.load(COS + token * half + i, mask=i < half, other=0.0)
    sin = tl.load(SIN + token * half + i, mask=i < half, other=0.0) * sign
    a = tl.load(X + token * sx + h * sxh + i, mask=there, other=0.0).to(tl.float32)
    b = tl.load(X + token * sx + h * sxh + half + i, mask=there, other=0.0).to(tl.float32)
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
            x, cos.contiguous(), sin.contiguous(), out, *x.stride()[:2], H, half, sign,
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


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn x (T, H, D), D even, by the angles whose cos and sin are (T, D / 2) fp32, which get no gradient.

    Raises ValueError naming the argument.
    """
    check(x.ndim == 3, "x", f"has {x.ndim} dimensions, expected (T, H, D)")
    is_float(x, "x")
    check(x.shape[2] % 2 == 0, "x", f"has head dim {x.shape[2]}, expected an even one")
    for name, table in (("cos", cos), ("sin", sin)):
        expected = (x.shape[0], x.shape[2] // 2)
        check(tuple(table.shape) == expected, name, f"has shape {tuple(table.shape)}, expected {expected}")
        check(table.dtype == torch.float32, name, f"is {table.dtype}, expected float32")
        check(table.device == x.device, name, f"is on {table.device}, x is on {x.device}")
    runs_here(x)
    op: Any = _rotate
    return op(x, cos, sin, 1.0)  # type: ignore[no-any-return]
