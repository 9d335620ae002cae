"""silu(gate) x up, forward and backward, each as one pass over memory (Shazeer 2020, arXiv:2002.05202).

The backward pass computes the sigmoid again: nothing but gate and up, which the matrix products before it need anyway,
is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bigtrain_kernels.checks import INTERPRETED, check, is_float, runs_here

_BLOCK = 64 if INTERPRETED else 2048
"""Numbers of a program: 16 a thread with 4 warps, so that loads are 128 bits wide."""


@triton.jit
def swiglu_forward(GATE, UP, OUT, count, BLOCK: tl.constexpr):
    """OUT = silu(GATE) x UP, in fp32 inside, fp64 for fp64."""
    E: tl.constexpr = tl.float64 if GATE.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + i, mask=i < count, other=0.0).to(E)
    up = tl.load(UP + i, mask=i < count, other=0.0).to(E)
    tl.store(OUT + i, (gate / (1 + tl.exp(-gate)) * up).to(OUT.dtype.element_ty), mask=i < count)


@triton.jit
def swiglu_backward(DOUT, GATE, UP, DGATE, DUP, count, BLOCK: tl.constexpr):
    """Gradients of both; s = sigmoid(gate): d silu = s (1 + gate (1 - s))."""
    E: tl.constexpr = tl.float64 if GATE.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(DOUT + i, mask=i < count, other=0.0).to(E)
    gate = tl.load(GATE + i, mask=i < count, other=0.0).to(E)
    up = tl.load(UP + i, mask=i < count, other=0.0).to(E)
    s = 1 / (1 + tl.exp(-gate))
    tl.store(DGATE + i, (d * up * s * (1 + gate * (1 - s))).to(DGATE.dtype.element_ty), mask=i < count)
    tl.store(DUP + i, (d * gate * s).to(DUP.dtype.element_ty), mask=i < count)


@torch.library.custom_op("bigtrain::swiglu", mutates_args=())
def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        swiglu_forward[(triton.cdiv(out.numel(), _BLOCK),)](
            gate, up, out, out.numel(), BLOCK=_BLOCK, num_warps=4
        )
    return out


@_swiglu.register_fake
def _(gate: Any, up: Any) -> torch.Tensor:
    return gate.new_empty(gate.shape)  # type: ignore[no-any-return]


@torch.library.custom_op("bigtrain::swiglu_backward", mutates_args=())
def _swiglu_backward(
    d: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    d, gate, up = d.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if d.numel():
        swiglu_backward[(triton.cdiv(d.numel(), _BLOCK),)](
            d, gate, up, dgate, dup, d.numel(), BLOCK=_BLOCK, num_warps=4
        )
    return dgate, dup


@_swiglu_backward.register_fake
def _(d: Any, gate: Any, up: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _remember(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _swiglu_backward(d, *ctx.saved_tensors)  # type: ignore[no-any-return]


_swiglu.register_autograd(_backward, setup_context=_remember)


def swiglu_bytes(count: int, size: int, *, backward: bool = False) -> int:
    """Bytes read and written at least once, for `count` numbers of `size` bytes: two in, one out; three in, two out."""
    return (5 if backward else 3) * count * size


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up, of any shape. Raises ValueError naming the argument."""
    is_float(gate, "gate")
    check(up.dtype == gate.dtype, "up", f"is {up.dtype}, gate is {gate.dtype}")
    check(up.shape == gate.shape, "up", f"has shape {tuple(up.shape)}, gate has {tuple(gate.shape)}")
    check(up.device == gate.device, "up", f"is on {up.device}, gate is on {gate.device}")
    runs_here(gate)
    op: Any = _swiglu
    return op(gate, up)  # type: ignore[no-any-return]
