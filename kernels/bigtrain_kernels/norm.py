"""Root-mean-square and layer normalisation, alone or with the residual sum before them, as one op each way.

    y = rms_norm(x, weight, eps)                          # x / rms(x) x weight, over the last dimension
    y = layer_norm(x, weight, bias, eps)                  # (x - mean) / standard deviation x weight + bias
    y, sum = rms_norm_residual(x, residual, weight, eps)  # of sum = x + residual, which is the next residual

Statistics are in fp32 (Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450), in fp64 for fp64
inputs. A row lies in registers; narrow rows share a program. The gradients of weight and bias are summed in two steps
of fixed order, no atomics: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bigtrain_kernels.checks import INTERPRETED, check, is_float, runs_here

WIDEST = 8192
"""A row lies in the registers of one program; the backward pass of 16,384 spills on sm_90."""
_TILE = 64 if INTERPRETED else 2048
"""Numbers of a program with narrow rows: 16 a thread with 4 warps, so that loads are 128 bits wide."""
_PROGRAMS = 4 if INTERPRETED else 1024
"""Programs of the backward pass: each sums the weight's gradient over its rows; a few for each of 132 SMs."""


@triton.jit
def norm_forward(
    X, RESIDUAL, WEIGHT, BIAS, Y, SUM, MEAN, SCALE, eps, rows, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Y = (s - MEAN) SCALE x WEIGHT + BIAS, s = X, or X + RESIDUAL rounded to X's dtype (SUM). MEAN, SCALE (rows,)."""
    E: tl.constexpr = SCALE.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    x = tl.load(X + at, mask=there, other=0.0).to(E)
    if ADD:
        x += tl.load(RESIDUAL + at, mask=there, other=0.0).to(E)
        rounded = x.to(SUM.dtype.element_ty)
        tl.store(SUM + at, rounded, mask=there)
        x = rounded.to(E)
    if CENTER:
        mean = tl.sum(x, 1) / C
        x = tl.where(there, x - mean[:, None], 0.0)
        tl.store(MEAN + row, mean, mask=row < rows)
    scale = 1 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    y = x * scale[:, None] * tl.load(WEIGHT + c, mask=c < C, other=0.0).to(E)[None, :]
    if SHIFT:
        y += tl.load(BIAS + c, mask=c < C, other=0.0).to(E)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=there)
    tl.store(SCALE + row, scale, mask=row < rows)


@triton.jit
def norm_backward(
    DY, DSUM, X, WEIGHT, MEAN, SCALE, DX, DWEIGHT, DBIAS, rows, C,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTER: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """DX of every programs-th block of rows, and this program's part of DWEIGHT and DBIAS (programs, C).

    With n the normalised x and g = dy x weight: dx = (g - n mean(g n) [- mean(g) if centred]) SCALE, plus DSUM, the
    gradient of the sum itself.
    """
    E: tl.constexpr = SCALE.dtype.element_ty
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    weight = tl.load(WEIGHT + c, mask=c < C, other=0.0).to(E)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], E)
    dbias = tl.zeros([ROWS, BLOCK], E)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        # + zeros: the interpreter counts in plain integers
        row = (tl.zeros([], tl.int64) + block) * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        scale = tl.load(SCALE + row, mask=row < rows, other=0.0)[:, None]
        n = tl.load(X + at, mask=there, other=0.0).to(E)
        if CENTER:
            n = tl.where(there, n - tl.load(MEAN + row, mask=row < rows, other=0.0)[:, None], 0.0)
        n *= scale
        dy = tl.load(DY + at, mask=there, other=0.0).to(E)
        g = dy * weight
        inner = g - n * (tl.sum(g * n, 1) / C)[:, None]
        if CENTER:
            inner -= (tl.sum(g, 1) / C)[:, None]
        dx = inner * scale
        if ADD:
            dx += tl.load(DSUM + at, mask=there, other=0.0).to(E)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=there)
        dweight += dy * n
        if SHIFT:
            dbias += dy
    out = program.to(tl.int64) * C + c
    tl.store(DWEIGHT + out, tl.sum(dweight, 0), mask=c < C)
    if SHIFT:
        tl.store(DBIAS + out, tl.sum(dbias, 0), mask=c < C)


def _shape(C: int) -> dict[str, int]:
    """Rows of a program, numbers of a row, and warps so that a thread holds 8 to 16 numbers: 128-bit loads."""
    block = triton.next_power_of_2(C)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 512))}


def programs_of(rows: int, C: int) -> int:
    """Programs of a backward pass, each of which leaves a part of the weight's gradient."""
    return int(min(triton.cdiv(rows, _shape(C)["ROWS"]), _PROGRAMS))


def _exact(x: torch.Tensor) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op("bigtrain::norm", mutates_args=())
def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, C) -> y (rows, C), the sum (empty without a residual), mean (empty if not `center`), scale (rows,)."""
    rows, C = x.shape
    x = x.contiguous()
    y, scale = torch.empty_like(x), torch.empty(rows, dtype=_exact(x), device=x.device)
    mean = torch.empty_like(scale) if center else scale.new_empty(0)
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    if rows:
        shape = _shape(C)
        norm_forward[(triton.cdiv(rows, shape["ROWS"]),)](
            x, x if residual is None else residual.contiguous(), weight.contiguous(),
            weight if bias is None else bias.contiguous(), y, total, mean, scale, eps, rows, C,
            ADD=residual is not None, CENTER=center, SHIFT=bias is not None, **shape,
        )  # fmt: skip
    return y, total, mean, scale


@_norm.register_fake
def _(x: Any, residual: Any, weight: Any, bias: Any, eps: Any, center: bool) -> Any:
    total = x.new_empty(x.shape) if residual is not None else x.new_empty(0)
    scale = x.new_empty(x.shape[:1], dtype=_exact(x))
    return x.new_empty(x.shape), total, x.new_empty(x.shape[0] if center else 0, dtype=_exact(x)), scale


@torch.library.custom_op("bigtrain::norm_backward", mutates_args=())
def _norm_backward(
    dy: torch.Tensor,
    dsum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    shift: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the weight, and of the bias if there is one (`shift`)."""
    rows, C = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not rows:
        return dx, torch.zeros_like(weight), torch.zeros_like(weight) if shift else weight.new_empty(0)
    shape, programs = _shape(C), programs_of(rows, C)
    parts = torch.empty(1 + shift, programs, C, dtype=scale.dtype, device=x.device)
    dy = dy.contiguous()
    norm_backward[(programs,)](
        dy, dy if dsum is None else dsum.contiguous(), x.contiguous(), weight.contiguous(), mean, scale, dx,
        parts[0], parts[-1], rows, C, ADD=dsum is not None, CENTER=mean.numel() > 0, SHIFT=shift, **shape,
    )  # fmt: skip
    sums = parts.sum(1).to(weight.dtype)
    return dx, sums[0], sums[1].clone() if shift else weight.new_empty(0)


@_norm_backward.register_fake
def _(dy: Any, dsum: Any, x: Any, weight: Any, mean: Any, scale: Any, shift: bool) -> Any:
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape if shift else 0),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, weight, bias, _, _ = inputs
    _, total, mean, scale = output
    ctx.save_for_backward(x if residual is None else total, weight, mean, scale)
    ctx.added, ctx.shift = residual is not None, bias is not None
    ctx.mark_non_differentiable(mean, scale)


def _backward(ctx: Any, dy: torch.Tensor, dsum: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    dx, dweight, dbias = _norm_backward(dy, dsum if ctx.added else None, *ctx.saved_tensors, ctx.shift)
    return dx, (dx.clone() if ctx.added else None), dweight, (dbias if ctx.shift else None), None, None


_norm.register_autograd(_backward, setup_context=_remember)


def norm_bytes(rows: int, C: int, size: int, *, residual: bool = False, backward: bool = False) -> int:
    """Bytes of the activations read and written at least once, elements of `size` bytes; weights are nothing to them.

    Forward: x in, y out, with a residual that in and the sum out. Backward: dy and x in, dx out, the sum's gradient in.
    """
    passes = (3 + residual) if backward else (2 + 2 * residual)
    return passes * rows * C * size


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x / rms(x) x weight over the last dimension: x (..., C), weight (C,). Raises ValueError naming the argument."""
    _check(x, weight, eps)
    return _apply(x, None, weight, None, eps, center=False)[0]


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual); residual like x. Raises ValueError naming the argument."""
    _check(x, weight, eps)
    _check_residual(x, residual)
    return _apply(x, residual, weight, None, eps, center=False)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) x weight + bias over the last dimension: x (..., C), weight and bias (C,).

    Raises ValueError naming the argument.
    """
    _check(x, weight, eps, bias)
    return _apply(x, None, weight, bias, eps, center=True)[0]


def layer_norm_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(x + residual), x + residual); residual like x. Raises ValueError naming the argument."""
    _check(x, weight, eps, bias)
    _check_residual(x, residual)
    return _apply(x, residual, weight, bias, eps, center=True)


def _apply(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    center: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    width = x.shape[-1]
    op: Any = _norm
    added = None if residual is None else residual.reshape(-1, width)
    y, total, _, _ = op(x.reshape(-1, width), added, weight, bias, eps, center)
    return y.view(x.shape), total if residual is None else total.view(x.shape)


def _check(x: torch.Tensor, weight: torch.Tensor, eps: float, bias: torch.Tensor | None = None) -> None:
    check(x.ndim > 0, "x", "has no dimension, expected (..., C)")
    is_float(x, "x")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        shape, expected = tuple(vector.shape), f"({x.shape[-1]},)"
        check(vector.shape == x.shape[-1:], name, f"has shape {shape}, expected {expected}")
        is_float(vector, name)
        check(vector.device == x.device, name, f"is on {vector.device}, x is on {x.device}")
        check(vector.dtype == weight.dtype, name, f"is {vector.dtype}, the weight is {weight.dtype}")
    check(0 < x.shape[-1] <= WIDEST, "x", f"has width {x.shape[-1]}, expected 1 to {WIDEST}")
    check(eps > 0, "eps", f"is {eps}, expected more than 0")
    runs_here(x)


def _check_residual(x: torch.Tensor, residual: torch.Tensor) -> None:
    check(residual.shape == x.shape, "residual", f"has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
    check(residual.dtype == x.dtype, "residual", f"is {residual.dtype}, x is {x.dtype}")
    check(residual.device == x.device, "residual", f"is on {residual.device}, x is on {x.device}")
