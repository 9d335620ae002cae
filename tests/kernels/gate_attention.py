"""Attention: see compile_gate.py."""

from __future__ import annotations

import torch
from bigtrain_kernels import attention  # noqa: F401 - defines the ops

from tests.kernels.compile_gate import Case


def both(dim: int, dtype: torch.dtype, left: int = -1, right: int = 0, softcap: float = 0.0) -> None:
    """Forward and backward of grouped-query attention over packed documents."""
    q = torch.zeros(256, 8, dim, dtype=dtype)
    k = torch.zeros(256, 2, dim, dtype=dtype)
    ends = torch.tensor([0, 100, 256], dtype=torch.int32)
    numbers = (256, 256, 0.1, left, right, softcap)
    out, lse = torch.ops.bigtrain.attention(q, k, k, ends, ends, *numbers, None)
    torch.ops.bigtrain.attention_backward(out, lse, q, k, k, out, lse, ends, ends, *numbers)


NEEDS = {"forward": "HGMMA", "backward_queries": "HGMMA", "backward_keys": "HGMMA"}
CASES = [
    Case("causal 128 bf16", lambda: both(128, torch.bfloat16), NEEDS),
    Case("causal 64 bf16", lambda: both(64, torch.bfloat16), NEEDS, quick=False),
    Case("causal 32 fp16", lambda: both(32, torch.float16), NEEDS, quick=False),
    Case("full 96 bf16", lambda: both(96, torch.bfloat16, right=-1), NEEDS, quick=False),
    Case("window 128 bf16", lambda: both(128, torch.bfloat16, left=1000), NEEDS, quick=False),
    Case("softcap 128 bf16", lambda: both(128, torch.bfloat16, softcap=30.0), NEEDS, quick=False),
    Case("causal 256 bf16", lambda: both(256, torch.bfloat16), {}, quick=False),
]
