"""What memory bounds: norms, SwiGLU, rotary positions, cross-entropy of logits, AdamW; against torch and Liger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bigtrain_kernels import adamw, cross_entropy, norm, reference, rope, swiglu

from benchmarks.kernel_cases.case import (
    DEVICE,
    KernelCase,
    Run,
    compiled,
    excess,
    installed,
    poison,
    runs_of,
)

BF16 = torch.bfloat16


def numbers(*shape: int, seed: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=dtype)


def plain_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def plain_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def plain_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def plain_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def rms(rows: int, C: int, part: str, aims: dict[str, float]) -> KernelCase:
    def prepare(seed: int) -> dict[str, Run]:
        leaves = [numbers(rows, C, seed=seed), numbers(C, seed=seed + 1)]
        functions: dict[str, Callable[..., Any]] = {
            "bigtrain": norm.rms_norm,
            "torch": plain_rms_norm,
            "compile": compiled(plain_rms_norm),
        }
        if installed("liger_kernel"):
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            functions["liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6)
        return runs_of(functions, leaves, part)

    def check(seed: int) -> float:
        parts = [numbers(33, 200, seed=seed), numbers(200, seed=seed + 1)]
        return excess(norm.rms_norm, lambda x, w: reference.rms_norm(x, w, 1e-6), parts)

    work = norm.norm_bytes(rows, C, 2, backward=part == "backward")
    return KernelCase(f"RMSNorm {part} {rows}x{C}", work, "GB/s", prepare, check, aims)


def layer(rows: int, C: int, part: str) -> KernelCase:
    def prepare(seed: int) -> dict[str, Run]:
        leaves = [numbers(rows, C, seed=seed), numbers(C, seed=seed + 1), numbers(C, seed=seed + 2)]
        functions = {
            "bigtrain": norm.layer_norm,
            "torch": plain_layer_norm,
            "compile": compiled(plain_layer_norm),
        }
        return runs_of(functions, leaves, part)

    def check(seed: int) -> float:
        parts = [numbers(33, 200, seed=seed), numbers(200, seed=seed + 1), numbers(200, seed=seed + 2)]
        return excess(norm.layer_norm, lambda x, w, b: reference.layer_norm(x, w, b, 1e-5), parts)

    work = norm.norm_bytes(rows, C, 2, backward=part == "backward")
    return KernelCase(f"LayerNorm {part} {rows}x{C}", work, "GB/s", prepare, check, {})


def gated(rows: int, ffn: int, part: str) -> KernelCase:
    def prepare(seed: int) -> dict[str, Run]:
        leaves = [numbers(rows, ffn, seed=seed), numbers(rows, ffn, seed=seed + 1)]
        functions: dict[str, Callable[..., Any]] = {
            "bigtrain": swiglu.swiglu,
            "torch": plain_swiglu,
            "compile": compiled(plain_swiglu),
        }
        if installed("liger_kernel"):
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            functions["liger"] = LigerSiLUMulFunction.apply
        return runs_of(functions, leaves, part)

    def check(seed: int) -> float:
        return excess(swiglu.swiglu, reference.swiglu, [numbers(33, 200, seed=seed + i) for i in range(2)])

    work = swiglu.swiglu_bytes(rows * ffn, 2, backward=part == "backward")
    return KernelCase(f"SwiGLU {part} {rows}x{ffn}", work, "GB/s", prepare, check, {"ceiling": 0.85})


def rotary(T: int, H: int, D: int) -> KernelCase:
    def tables(T: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = numbers(T, half, seed=9, dtype=torch.float32)
        return angles.cos(), angles.sin()

    def prepare(seed: int) -> dict[str, Run]:
        both = tables(T, D // 2)
        functions = {"bigtrain": rope.rotate, "torch": plain_rotate, "compile": compiled(plain_rotate)}
        wholes = {name: (lambda x, f=f: f(x, *both)) for name, f in functions.items()}
        return runs_of(wholes, [numbers(T, H, D, seed=seed)], "forward")

    def check(seed: int) -> float:
        both = tables(33, 32)
        ours, definition = (lambda x, f=f: f(x, *both) for f in (rope.rotate, reference.rotate))
        return excess(ours, definition, [numbers(33, 5, 64, seed=seed)])

    work = rope.rotate_bytes(T, H, D, 2)
    return KernelCase(f"RoPE {T}x{H}x{D}", work, "GB/s", prepare, check, {"ceiling": 0.85})


def of_logits(T: int, V: int, part: str) -> KernelCase:
    def chosen(T: int, V: int, seed: int) -> torch.Tensor:
        return torch.randint(0, V, (T,), generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)

    def prepare(seed: int) -> dict[str, Run]:
        targets = chosen(T, V, seed)
        functions: dict[str, Callable[..., Any]] = {
            "bigtrain": lambda x: cross_entropy.cross_entropy(x, targets, reduction="none"),
            "torch": lambda x: plain_cross_entropy(x, targets),
            "compile": lambda x: compiled(plain_cross_entropy)(x, targets),
        }
        return runs_of(functions, [numbers(T, V, seed=seed)], part)

    def check(seed: int) -> float:
        targets = chosen(33, 200, seed)
        targets[::7] = -100
        return excess(
            lambda x: cross_entropy.cross_entropy(x, targets, reduction="none", z_loss=1e-3),
            lambda x: reference.cross_entropy(x, targets, z_loss=1e-3),
            [numbers(33, 200, seed=seed)],
        )

    work = cross_entropy.cross_entropy_bytes(T, V, 2, backward=part == "backward")
    return KernelCase(f"cross-entropy {part} T{T} V{V}", work, "GB/s", prepare, check)


def updates(tensors: int, size: int) -> KernelCase:
    def made(tensors: int, size: int, seed: int) -> list[list[torch.Tensor]]:
        lists = [
            [numbers(size, seed=seed + i, dtype=torch.float32) for i in range(tensors)] for _ in range(4)
        ]
        return [*lists[:3], [x.abs_() for x in lists[3]]]

    def prepare(seed: int) -> dict[str, Run]:
        lists = made(tensors, size, seed)
        theirs = [x.clone().requires_grad_() for x in lists[0]]
        for p, g in zip(theirs, lists[1], strict=True):
            p.grad = g
        optimizer = torch.optim.AdamW(theirs, lr=1e-4, weight_decay=0.1, fused=True)
        return {
            "bigtrain": lambda: adamw.adamw_(*lists, step=7, lr=1e-4, weight_decay=0.1),
            "torch-fused": optimizer.step,
        }

    def check(seed: int) -> float:
        lists = made(3, 777, seed)
        before = [[x.double() for x in some] for some in lists]
        poison()
        adamw.adamw_(*lists, step=7, lr=1e-2, weight_decay=0.1)
        worst = 0.0
        options: Any = {"step": 7, "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
        for *given, p, _, m, v in zip(*before, *lists, strict=True):
            for found, wanted in zip((p, m, v), reference.adamw(*given, **options), strict=True):
                allowed = 4 * 2**-23 * wanted.abs() + 2**-23  # four roundings
                worst = max(worst, float(((found - wanted).abs() / allowed).nan_to_num(torch.inf).max()))
        return worst

    count = tensors * size
    return KernelCase(
        f"AdamW {tensors} x {size}",
        adamw.adamw_bytes(count),
        "GB/s",
        prepare,
        check,
        {"torch-fused": 1.0, "ceiling": 0.85},
    )


CASES = [
    rms(16384, 4096, "forward", {"compile": 1.0, "ceiling": 0.85}),
    rms(16384, 4096, "backward", {"compile": 1.9}),
    rms(8192, 8192, "backward", {"compile": 1.9}),
    rms(524288, 128, "backward", {}),
    layer(16384, 4096, "forward"),
    layer(16384, 4096, "backward"),
    gated(16384, 14336, "forward"),
    gated(16384, 14336, "backward"),
    rotary(16384, 32, 128),
    of_logits(4096, 128256, "forward"),
    of_logits(4096, 128256, "backward"),
    updates(64, 1 << 22),
]
