"""Norms, SwiGLU, rotary positions, AdamW: see compile_gate.py."""

from __future__ import annotations

import torch
from bigtrain_kernels import adamw, norm, rope, swiglu  # noqa: F401 - defines the ops

from tests.kernels.compile_gate import Case


def normalised(width: int, dtype: torch.dtype, center: bool = False) -> None:
    x, weight = torch.zeros(64, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    y, total, mean, scale = torch.ops.bigtrain.norm(x, x, weight, weight if center else None, 1e-6, center)
    torch.ops.bigtrain.norm_backward(y, total, x, weight, mean, scale, center)


def gated() -> None:
    x = torch.zeros(64, 4096, dtype=torch.bfloat16)
    torch.ops.bigtrain.swiglu(x, x)
    torch.ops.bigtrain.swiglu_backward(x, x, x)


def rotary() -> None:
    table = torch.zeros(64, 64)
    torch.ops.bigtrain.rotate(torch.zeros(64, 32, 128, dtype=torch.bfloat16), table, table, 1.0)


def updated(gradient: torch.dtype, copies: bool) -> None:
    p, g = torch.zeros(4096), torch.zeros(4096, dtype=gradient)
    torch.ops.bigtrain.adamw_([p], [g], [p], [p], [g] if copies else [], p[:1], 1, 1e-3, 0.9, 0.95, 1e-8, 0.1)


WIDE = {"norm_forward": "LDG.E.128", "norm_backward": "LDG.E.128"}
UPDATE = {"adamw_step": "LDG.E.128"}
CASES = [
    Case("rms_norm 4096 bf16", lambda: normalised(4096, torch.bfloat16), WIDE),
    Case("rms_norm 128 bf16", lambda: normalised(128, torch.bfloat16), WIDE),
    Case("rms_norm 1024 fp32", lambda: normalised(1024, torch.float32), WIDE, quick=False),
    Case("rms_norm 8192 bf16", lambda: normalised(8192, torch.bfloat16), WIDE, quick=False),
    Case("layer_norm 4096 bf16", lambda: normalised(4096, torch.bfloat16, center=True), WIDE),
    Case("layer_norm 8192 bf16", lambda: normalised(8192, torch.bfloat16, center=True), WIDE, quick=False),
    Case("swiglu bf16", gated, {"swiglu_forward": "LDG.E.128", "swiglu_backward": "STG.E.128"}),
    Case("rotate 128 bf16", rotary, {"rotate_rows": "LDG.E.128"}),
    Case("adamw fp32", lambda: updated(torch.float32, copies=False), UPDATE),
    Case(
        "adamw bf16 gradients and copies", lambda: updated(torch.bfloat16, copies=True), UPDATE, quick=False
    ),
]
