"""The model's attention through our kernels, against the explicit one: rows, documents, windows, GQA, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from bigtrain.config import ModelConfig
from bigtrain.model.attention import attend_fused, attend_reference, make_scope, takes_fused
from bigtrain.model.build import build_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def config(**more: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 11,
        "layers": 2,
        "width": 64,
        "heads": 4,
        "kv_heads": 2,
        "max_length": 64,
    }
    return ModelConfig(**{**fields, **more})


@pytest.mark.parametrize("cu", [None, [0, 40, 80], [0, 13, 40, 41, 80], [0, 13, 60, 80]])
@pytest.mark.parametrize("kind", [{}, {"sliding_window": 5}, {"objective": "masked"}])
def test_as_the_explicit_attention(kind: dict[str, Any], cu: list[int] | None) -> None:
    B, S = 2, 40
    tokens = torch.zeros(B, S, dtype=torch.int64, device=DEVICE)
    lengths = None if cu is None else torch.tensor(cu, dtype=torch.int32, device=DEVICE)
    fused = make_scope(config(**kind), tokens, lengths, fused=True)
    explicit = make_scope(config(**kind), tokens, lengths, explicit=True)
    assert fused.mask is None
    assert torch.equal(fused.positions.expand(B, S), explicit.positions.expand(B, S))
    parts = [torch.randn(B, S, h, 16, device=DEVICE, dtype=DTYPE, requires_grad=True) for h in (4, 2, 2)]
    grad = torch.randn(B, S, 4, 16, device=DEVICE, dtype=DTYPE)
    found, wanted = attend_fused(*parts, fused), attend_reference(*parts, explicit)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, parts, grad), torch.autograd.grad(wanted, parts, grad)
    )


def test_the_last_columns_of_context_parallelism() -> None:
    """Queries that stand at the end of the keys, told by torch's bias and no mask."""
    tokens = torch.zeros(1, 40, dtype=torch.int64, device=DEVICE)
    scope = make_scope(config(), tokens, fused=True, queries=torch.arange(24, 40, device=DEVICE))
    assert scope.mask is None
    q, k, v = (torch.randn(1, n, h, 16, device=DEVICE, dtype=DTYPE) for n, h in ((16, 4), (40, 2), (40, 2)))
    bias: Any = causal_lower_right(16, 40)
    seen = torch.arange(24, 40, device=DEVICE)[:, None] >= torch.arange(40, device=DEVICE)
    wanted = attend_reference(q, k, v, replace(scope, mask=seen[None, None]))
    torch.testing.assert_close(attend_fused(q, k, v, replace(scope, mask=bias)), wanted)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_of_them_learns_the_same(recompute: str) -> None:
    tokens = torch.randint(0, 11, (2, 24), device=DEVICE)
    ends = torch.tensor([0, 13, 24, 40, 48], dtype=torch.int32, device=DEVICE)
    losses = {}
    for kernels in ("reference", "triton"):
        model = build_model(config(layers=1, sliding_window=9), kernels=kernels, recompute=recompute).to(
            DEVICE, DTYPE
        )
        loss = model(tokens, cu_seqlens=ends, targets=tokens).objective
        loss.backward()
        losses[kernels] = [loss.detach()] + [p.grad for p in model.parameters()]
    torch.testing.assert_close(losses["triton"], losses["reference"])


def test_who_takes_them(caplog: pytest.LogCaptureFixture) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert takes_fused("auto", 128, torch.bfloat16, gpu)
    assert not takes_fused("auto", 128, torch.bfloat16, cpu)
    assert not takes_fused("reference", 128, torch.bfloat16, gpu)
    assert takes_fused("triton", 128, torch.float32, cpu)
    with caplog.at_level("WARNING"):
        assert not takes_fused("auto", 128, torch.float32, gpu)
        assert not takes_fused("auto", 512, torch.bfloat16, gpu)
    assert "torch.float32 is not theirs" in caplog.text
    assert "a head of 512 is larger than 256" in caplog.text
