"""Attention: see compile_gate.py."""

from __future__ import annotations

import torch
from bigtrain_kernels import attention

from tests.kernels.compile_gate import Case


def forward() -> None:
    q = torch.zeros(256, 8, 128, dtype=torch.bfloat16)
    k = q[:, :2].contiguous()
    cu = torch.tensor([0, 256], dtype=torch.int32)
    torch.ops.bigtrain.attention(q, k, k, cu, cu, 256, 256, 0.1, -1, 0, 0.0, None)


CASES = [Case("forward 128", forward, {"forward": "HGMMA"})]
