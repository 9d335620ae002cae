"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over many tensors in one launch, one pass over memory.

    adamw_(parameters, gradients, first, second, step=7, lr=3e-4, weight_decay=0.1, scale=clip, copies=weights)

Parameters and moments are fp32 (fp64 for tests); gradients and `copies`, the weights that the model computes with, may
have 16 bits. So a step of mixed precision is one pass: 28 bytes a parameter with fp32 gradients and no copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from bigtrain_kernels.checks import INTERPRETED, check, runs_here

_BLOCK = 64 if INTERPRETED else 1024
"""Numbers of a program: 4 of each tensor a thread with 8 warps, so that loads of fp32 are 128 bits wide."""


@triton.jit
def _update(
    row, i, there, SCALE, keep, rate, beta1, beta2, rest1, rest2, correction2, eps,
    P: tl.constexpr, G: tl.constexpr, L: tl.constexpr, COPY: tl.constexpr, CLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Numbers `i` of a tensor; `there` is a mask, or None when all of them exist."""
    parameter = tl.load(row).to(tl.pointer_type(P))
    gradient = tl.load(row + 1).to(tl.pointer_type(G))
    first = tl.load(row + 2).to(tl.pointer_type(P))
    second = tl.load(row + 3).to(tl.pointer_type(P))
    if ALIGNED:
        parameter, gradient = tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16)
        first, second = tl.multiple_of(first, 16), tl.multiple_of(second, 16)
    g = tl.load(gradient + i, mask=there).to(P)
    if CLIP:
        g *= tl.load(SCALE).to(P)
    p = tl.load(parameter + i, mask=there)
    m = beta1 * tl.load(first + i, mask=there) + rest1 * g
    v = beta2 * tl.load(second + i, mask=there) + rest2 * g * g
    p = p * keep - rate * m / (tl.sqrt(v / correction2) + eps)
    tl.store(first + i, m, mask=there)
    tl.store(second + i, v, mask=there)
    tl.store(parameter + i, p, mask=there)
    if COPY:
        copy = tl.load(row + 4).to(tl.pointer_type(L))
        if ALIGNED:
            copy = tl.multiple_of(copy, 16)
        tl.store(copy + i, p.to(L), mask=there)


@triton.jit
def adamw_step(
    TENSORS, BLOCKS, SCALE, keep, rate, beta1, beta2, rest1, rest2, correction2, eps,
    BLOCK: tl.constexpr, P: tl.constexpr, G: tl.constexpr, L: tl.constexpr, COPY: tl.constexpr, CLIP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One block of one tensor. TENSORS (n, 6) int64: addresses of parameter, gradient, both moments and copy, and size.

    BLOCKS (programs, 2) int32: which tensor, which block of it. P, G, L: dtypes of parameters, gradients and copies.
    keep: 1 - lr x decay; rate: lr / (1 - beta1^step); rest: 1 - beta, computed before rounding, for 1 - 0.999 in fp32
    is off by 5e-5 of itself.
    """
    row = TENSORS + tl.load(BLOCKS + 2 * tl.program_id(0)) * 6
    start = tl.load(BLOCKS + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    size = tl.load(row + 5)
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:  # a mask whose size is not known to be even would make loads narrow
        _update(row, i, None, SCALE, keep, rate, beta1, beta2, rest1, rest2, correction2, eps, P, G, L, COPY, CLIP,
                ALIGNED)  # fmt: skip
    else:
        _update(row, i, i < size, SCALE, keep, rate, beta1, beta2, rest1, rest2, correction2, eps, P, G, L, COPY, CLIP,
                ALIGNED)  # fmt: skip


_KINDS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@lru_cache(64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(programs, 2) int32 for tensors of these sizes: they stay the same from step to step."""
    rows = [
        torch.stack([torch.full((n,), i, dtype=torch.int32), torch.arange(n, dtype=torch.int32)], 1)
        for i, n in enumerate(triton.cdiv(size, _BLOCK) for size in sizes)
    ]
    return torch.cat(rows).to(device)


def _addresses(lists: Sequence[Sequence[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """(n, 6) int64; gradients move, so it is made anew every step, and sent without waiting for the device."""
    rows = [[*(x.data_ptr() for x in one), one[0].numel()] for one in zip(*lists, strict=True)]
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@torch.library.custom_op("bigtrain::adamw_", mutates_args=("parameters", "first", "second", "copies"))
def _adamw(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    first: list[torch.Tensor],
    second: list[torch.Tensor],
    copies: list[torch.Tensor],
    scale: torch.Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """All tensors contiguous, on one device, of one dtype a list; `copies` as many or none."""
    given = [parameters, [g.contiguous() for g in gradients], first, second, copies or parameters]
    alive = [i for i, p in enumerate(parameters) if p.numel()]
    if not alive:
        return
    lists = [[some[i] for i in alive] for some in given]
    device = parameters[0].device
    blocks = _blocks(tuple(p.numel() for p in lists[0]), device)
    table = _addresses(lists, device)
    adamw_step[(len(blocks),)](
        table, blocks, table if scale is None else scale, 1 - lr * weight_decay, lr / (1 - beta1**step), beta1, beta2,
        1 - beta1, 1 - beta2, 1 - beta2**step, eps, BLOCK=_BLOCK, P=_KINDS[parameters[0].dtype],
        G=_KINDS[gradients[0].dtype], L=_KINDS[given[4][0].dtype], COPY=bool(copies), CLIP=scale is not None,
        ALIGNED=all(x.data_ptr() % 16 == 0 for some in lists for x in some), num_warps=8,
    )  # fmt: skip


@_adamw.register_fake
def _(*_: Any) -> None:
    return None


def adamw_bytes(count: int, gradient: int = 4, copy: int = 0) -> int:
    """Bytes read and written at least once: fp32 parameter and moments both ways, gradient in, copy out."""
    return count * (6 * 4 + gradient + copy)


def adamw_(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: torch.Tensor | None = None,
    copies: Sequence[torch.Tensor] = (),
) -> None:
    """Update `parameters` and their moments, lists of as many tensors of any shape, in place.

    `step`: number of this update, from 1. `scale`: one fp32 number on the device that gradients are multiplied by, as
    clipping needs it, without waiting for its value. `copies`: as many tensors that get the updated parameters in
    another dtype. No tensor may share memory with another. Raises ValueError naming the argument.
    """
    _check(parameters, gradients, first, second, copies, scale)
    check(step >= 1, "step", f"is {step}, expected 1 or more")
    check(lr >= 0, "lr", f"is {lr}, expected 0 or more")
    check(all(0 <= beta < 1 for beta in betas), "betas", f"are {betas}, expected two in [0, 1)")
    check(eps > 0, "eps", f"is {eps}, expected more than 0")
    check(weight_decay >= 0, "weight_decay", f"is {weight_decay}, expected 0 or more")
    if parameters:
        op: Any = _adamw
        lists = [list(some) for some in (parameters, gradients, first, second, copies)]
        op(*lists, scale, step, lr, *betas, eps, weight_decay)


def _check(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    copies: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
) -> None:
    for name, some in (("gradients", gradients), ("first", first), ("second", second), ("copies", copies)):
        if name == "copies" and not some:
            continue
        check(len(some) == len(parameters), name, f"hold {len(some)} tensors, parameters {len(parameters)}")
        for i, (x, p) in enumerate(zip(some, parameters, strict=True)):
            shape = f"has shape {tuple(x.shape)}, its parameter {tuple(p.shape)}"
            check(x.shape == p.shape, f"{name}[{i}]", shape)
    exact = (torch.float32, torch.float64)
    for name, some, known in (
        ("parameters", parameters, exact),
        ("first", first, tuple(p.dtype for p in parameters[:1])),
        ("second", second, tuple(p.dtype for p in parameters[:1])),
        ("gradients", gradients, tuple(_KINDS)),
        ("copies", copies, tuple(_KINDS)),
    ):
        for i, x in enumerate(some):
            check(x.dtype in known, f"{name}[{i}]", f"is {x.dtype}, expected {' or '.join(map(str, known))}")
            check(x.dtype == some[0].dtype, f"{name}[{i}]", f"is {x.dtype}, {name}[0] is {some[0].dtype}")
            where = f"is on {x.device}, parameters[0] is on {parameters[0].device}"
            check(x.device == parameters[0].device, f"{name}[{i}]", where)
            dense = x.is_contiguous() or name == "gradients"
            check(dense, f"{name}[{i}]", "is not contiguous, and it is written in place")
    if scale is not None:
        check(scale.numel() == 1, "scale", f"has {scale.numel()} numbers, expected 1")
        where = f"is on {scale.device}, parameters[0] is on {parameters[0].device}"
        check(scale.device == parameters[0].device, "scale", where)
    if parameters:
        runs_here(parameters[0])
