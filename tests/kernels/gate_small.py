"""RMSNorm, SwiGLU, rotary positions: see compile_gate.py."""

from __future__ import annotations

import torch
from bigtrain_kernels import rmsnorm, rope, swiglu  # noqa: F401 - defines the ops

from tests.kernels.compile_gate import Case


def norm(width: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(64, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    y, total, scale = torch.ops.bigtrain.rms_norm(x, x, weight, 1e-6)
    torch.ops.bigtrain.rms_norm_backward(y, total, x, weight, scale)


def gated() -> None:
    x = torch.zeros(64, 4096, dtype=torch.bfloat16)
    torch.ops.bigtrain.swiglu(x, x)
    torch.ops.bigtrain.swiglu_backward(x, x, x)


def rotary() -> None:
    table = torch.zeros(64, 64)
    torch.ops.bigtrain.rotate(torch.zeros(64, 32, 128, dtype=torch.bfloat16), table, table, 1.0)


WIDE = {"rms_norm_forward": "LDG.E.128", "rms_norm_backward": "LDG.E.128"}
CASES = [
    Case("rms_norm 4096 bf16", lambda: norm(4096, torch.bfloat16), WIDE),
    Case("rms_norm 1024 fp32", lambda: norm(1024, torch.float32), WIDE, quick=False),
    Case("rms_norm 8192 bf16", lambda: norm(8192, torch.bfloat16), WIDE, quick=False),
    Case("swiglu bf16", gated, {"swiglu_forward": "LDG.E.128", "swiglu_backward": "STG.E.128"}),
    Case("rotate 128 bf16", rotary, {"rotate_rows": "LDG.E.128"}),
]
