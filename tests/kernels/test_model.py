"""The model in our kernels, against the explicit operations: documents, windows, norms, biases, gradients."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.model.attention import attend_fused, attend_reference, make_scope
from bigtrain.model.batch import IGNORE
from bigtrain.model.build import build_model
from bigtrain.model.kernels import _tell, attention_in_triton

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


KINDS: dict[str, dict[str, Any]] = {
    "llama": {"sliding_window": 9, "qk_norm": True, "tied": True},
    "gpt": {"norm": "layernorm", "bias": True, "activation": "gelu", "position": "learned"},
    "plain layer norm": {"norm": "layernorm", "bias": False, "objective": "masked"},
    "lstm": {"kind": "lstm", "vocab_size": 11, "layers": 2, "width": 24},
}


@pytest.mark.parametrize(
    ("kind", "recompute"), [*((k, "none") for k in KINDS), ("llama", "selective"), ("gpt", "full")]
)
def test_a_model_of_them_learns_the_same(kind: str, recompute: str) -> None:
    given = ModelConfig(**KINDS[kind]) if kind == "lstm" else config(layers=1, **KINDS[kind])
    tokens = torch.randint(0, 11, (2, 24), device=DEVICE)
    targets = torch.where(torch.rand(2, 24, device=DEVICE) < 0.3, IGNORE, tokens)
    ends = torch.tensor([0, 13, 24, 40, 48], dtype=torch.int32, device=DEVICE)
    found = {}
    for kernels in ("reference", "triton"):
        loss = LossConfig(z_loss=1e-2, label_smoothing=0.1)
        model = build_model(given, loss, kernels=kernels, recompute=recompute).to(DEVICE, DTYPE)
        sums = model(tokens, cu_seqlens=ends, targets=targets)
        (0.25 * sums.objective).backward()
        found[kernels] = [sums.objective.detach(), sums.nll, *(p.grad for p in model.parameters())]
    torch.testing.assert_close(found["triton"], found["reference"])


def test_generation_with_them() -> None:
    prompt = torch.randint(0, 11, (1, 7), device=DEVICE)
    logits = {}
    for kernels in ("reference", "triton"):
        model = build_model(config(), kernels=kernels).to(DEVICE, DTYPE).eval()
        cache = model.new_cache(1, 12)
        with torch.no_grad():
            model(prompt[:, :5], cache=cache)
            logits[kernels] = model(prompt[:, 5:], cache=cache)
    torch.testing.assert_close(logits["triton"], logits["reference"])


def test_who_takes_them(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.empty(1)
    gpu: Any = SimpleNamespace(is_cuda=True)
    _tell.cache_clear()  # what another test was told
    assert attention_in_triton("auto", 128, torch.bfloat16, gpu)
    assert not attention_in_triton("auto", 128, torch.bfloat16, cpu)
    assert not attention_in_triton("reference", 128, torch.bfloat16, gpu)
    assert attention_in_triton("triton", 128, torch.float32, cpu)
    with caplog.at_level("WARNING"):
        assert not attention_in_triton("auto", 128, torch.float32, gpu)
        assert not attention_in_triton("auto", 512, torch.bfloat16, gpu)
    assert "torch.float32 is not theirs" in caplog.text
    assert "a head of 512 is larger than 256" in caplog.text
