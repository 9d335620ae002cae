"""Cross-entropy: see compile_gate.py."""

from __future__ import annotations

import torch
from bigtrain_kernels import linear_cross_entropy  # noqa: F401 - defines the ops

from tests.kernels.compile_gate import Case


def chunked(dtype: torch.dtype, softcap: float) -> None:
    hidden, weight = torch.zeros(256, 64, dtype=dtype), torch.zeros(8192, 64, dtype=dtype)
    targets, ones = torch.zeros(256, dtype=torch.int64), torch.ones(256)
    torch.ops.bigtrain.linear_cross_entropy(
        hidden, weight, None, targets, ones, -100, 0.1, 1e-4, softcap, 0, 8192, "", True, 1 << 28, True
    )


def plain(dtype: torch.dtype) -> None:
    logits, targets = torch.zeros(256, 8192, dtype=dtype), torch.zeros(256, dtype=torch.int64)
    options = (-100, 0.1, 1e-4, 0.0)
    loss, lse = torch.ops.bigtrain.cross_entropy(logits, targets, *options)
    torch.ops.bigtrain.cross_entropy_backward(loss, logits, targets, lse, *options)


NEEDS = {"row_sums": "LDG.E.128", "gradient": "STG.E.128"}
CASES = [
    Case("linear cross-entropy bf16", lambda: chunked(torch.bfloat16, 0.0), NEEDS),
    Case("linear cross-entropy bf16 softcap", lambda: chunked(torch.bfloat16, 30.0), NEEDS, quick=False),
    Case("linear cross-entropy fp16", lambda: chunked(torch.float16, 0.0), NEEDS, quick=False),
    Case("linear cross-entropy fp32", lambda: chunked(torch.float32, 0.0), NEEDS, quick=False),
    Case("cross-entropy bf16", lambda: plain(torch.bfloat16), NEEDS),
]
