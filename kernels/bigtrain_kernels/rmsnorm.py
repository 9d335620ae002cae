"""Root-mean-square normalisation, alone or with the residual sum before it, as one op each way.

    y = rms_norm(x, weight, eps)                          # x / rms(x) x weight, over the last dimension
    y, sum = rms_norm_residual(x, residual, weight, eps)  # of sum = x + residual, which is the next residual

A row a program; statistics in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467). The weight's gradient is summed in two
steps of fixed order, no atomics: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bigtrain_kernels.checks import INTERPRETED, check, is_float, runs_here

_WIDEST = 8192
"""A row lies in the registers of one program; the backward pass of 16,384 spills on sm_90."""
_PROGRAMS = 4 if INTERPRETED else 1024
"""Programs of the backward pass: each sums the weight's gradient over its rows; a few for each of 132 SMs."""


@triton.jit
def rms_norm_forward(
    X, RESIDUAL, WEIGHT, Y, SUM, RMS, eps, C, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Y = s / rms(s) x WEIGHT, s = X, or X + RESIDUAL rounded to X's dtype (SUM); RMS (rows,): 1 / rms(s)."""
    row = tl.program_id(0).to(tl.int64) * C
    c = tl.arange(0, BLOCK)
    there = c < C
    x = tl.load(X + row + c, mask=there, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(RESIDUAL + row + c, mask=there, other=0.0).to(tl.float32)
        rounded = x.to(SUM.dtype.element_ty)
        tl.store(SUM + row + c, rounded, mask=there)
        x = rounded.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / C + eps)
    weight = tl.load(WEIGHT + c, mask=there, other=0.0).to(tl.float32)
    tl.store(Y + row + c, (x * scale * weight).to(Y.dtype.element_ty), mask=there)
    tl.store(RMS + tl.program_id(0), scale)


@triton.jit
def rms_norm_backward(
    DY, DSUM, X, WEIGHT, RMS, DX, DWEIGHT, rows, C, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """DX of every programs-th row, and this program's part of the weight's gradient: DWEIGHT (programs, C) fp32.

    With n = x / rms(x) and g = dy x weight: dx = (g - n mean(g n)) / rms(x), plus DSUM, the gradient of the sum itself.
    """
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    there = c < C
    weight = tl.load(WEIGHT + c, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(program, rows, tl.num_programs(0)):
        row = (tl.zeros([], tl.int64) + number) * C  # the interpreter counts in plain integers
        scale = tl.load(RMS + number)
        n = tl.load(X + row + c, mask=there, other=0.0).to(tl.float32) * scale
        dy = tl.load(DY + row + c, mask=there, other=0.0).to(tl.float32)
        g = dy * weight
        dx = (g - n * (tl.sum(g * n, 0) / C)) * scale
        if ADD:
            dx += tl.load(DSUM + row + c, mask=there, other=0.0).to(tl.float32)
        tl.store(DX + row + c, dx.to(DX.dtype.element_ty), mask=there)
        total += dy * n
    tl.store(DWEIGHT + program.to(tl.int64) * C + c, total, mask=there)


def _warps(block: int) -> int:
    """So that a thread holds 8 to 16 numbers: 128-bit loads."""
    return min(16, max(1, block // 512))


@torch.library.custom_op("bigtrain::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, C) -> y (rows, C), the sum (empty without a residual), 1 / rms (rows,)."""
    rows, C = x.shape
    x = x.contiguous()
    y, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    if rows:
        block = triton.next_power_of_2(C)
        other = x if residual is None else residual.contiguous()
        rms_norm_forward[(rows,)](
            x, other, weight.contiguous(), y, total, scale, eps, C,
            BLOCK=block, ADD=residual is not None, num_warps=_warps(block),
        )  # fmt: skip
    return y, total, scale


@_rms_norm.register_fake
def _(x: Any, residual: Any, weight: Any, eps: Any) -> Any:
    total = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op("bigtrain::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: torch.Tensor, dsum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, C = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not rows:
        return dx, torch.zeros_like(weight)
    programs = min(rows, _PROGRAMS)
    parts = torch.empty(programs, C, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(C)
    dy = dy.contiguous()
    rms_norm_backward[(programs,)](
        dy, dy if dsum is None else dsum.contiguous(), x.contiguous(), weight.contiguous(), scale, dx, parts, rows, C,
        BLOCK=block, ADD=dsum is not None, num_warps=_warps(block),
    )  # fmt: skip
    return dx, parts.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(dy: Any, dsum: Any, x: Any, weight: Any, scale: Any) -> Any:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.save_for_backward(x if residual is None else total, weight, scale)
    ctx.added = residual is not None
    ctx.mark_non_differentiable(scale)


def _backward(ctx: Any, dy: torch.Tensor, dsum: torch.Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, scale = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy, dsum if ctx.added else None, x, weight, scale)
    return dx, (dx.clone() if ctx.added else None), dweight, None


_rms_norm.register_autograd(_backward, setup_context=_remember)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / rms(x) x weight over the last dimension: x (..., C), weight (C,). Raises ValueError naming the argument."""
    _check(x, weight, eps)
    op: Any = _rms_norm
    return op(x.reshape(-1, x.shape[-1]), None, weight, eps)[0].view(x.shape)  # type: ignore[no-any-return]


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); residual like x. Raises ValueError naming the argument."""
    _check(x, weight, eps)
    check(residual.shape == x.shape, "residual", f"has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
    check(residual.dtype == x.dtype, "residual", f"is {residual.dtype}, x is {x.dtype}")
    op: Any = _rms_norm
    width = x.shape[-1]
    y, total, _ = op(x.reshape(-1, width), residual.reshape(-1, width), weight, eps)
    return y.view(x.shape), total.view(x.shape)


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    check(x.ndim > 0, "x", "has no dimension, expected (..., C)")
    is_float(x, "x")
    check(
        weight.shape == x.shape[-1:], "weight", f"has shape {tuple(weight.shape)}, expected ({x.shape[-1]},)"
    )
    is_float(weight, "weight")
    check(weight.device == x.device, "weight", f"is on {weight.device}, x is on {x.device}")
    check(0 < x.shape[-1] <= _WIDEST, "x", f"has width {x.shape[-1]}, expected 1 to {_WIDEST}")
    check(eps > 0, "eps", f"is {eps}, expected more than 0")
    runs_here(x)
