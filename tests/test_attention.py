"""Who sees whom, and the fused attention against the explicit one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.config import ModelConfig
from bigtrain.model.attention import attend_reference, attend_sdpa, documents, make_scope


def config(**more: Any) -> ModelConfig:
    fields: dict[str, Any] = {"vocab_size": 11, "layers": 1, "width": 32, "heads": 4, "max_length": 2048}
    return ModelConfig(**{**fields, **more})


def test_documents() -> None:
    document, position = documents(torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32), 2, 5)
    assert document.tolist() == [[0, 0, 1, 1, 1], [2, 3, 3, 3, 3]]
    assert position.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]


def test_empty_documents_are_harmless() -> None:
    document, position = documents(torch.tensor([0, 2, 2, 4]), 1, 4)
    assert document.tolist() == [[0, 0, 2, 2]]
    assert position.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("objective", ["causal", "masked"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cu", [None, [0, 6, 12], [0, 2, 6, 7, 12]])
def test_visibility_by_definition(objective: str, window: int | None, cu: list[int] | None) -> None:
    """The mask (or its absence) against the definition, written as loops."""
    if objective == "masked" and window:
        pytest.skip("refused by the config")
    B, S = 2, 6
    lengths = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    scope = make_scope(config(objective=objective, sliding_window=window), torch.zeros(B, S).long(), lengths)
    bounds = cu or [0, 6, 12]
    owner = [sum(b <= t for b in bounds[1:]) for t in range(B * S)]
    expected = torch.zeros(B, S, S, dtype=torch.bool)
    for b in range(B):
        for i in range(S):
            for j in range(S):
                same = owner[b * S + i] == owner[b * S + j]
                past = objective == "masked" or j <= i
                near = window is None or i - j < window
                expected[b, i, j] = same and past and near
    if scope.mask is None:
        assert window is None
        assert bounds == [0, 6, 12]
        seen = torch.ones(B, S, S, dtype=torch.bool)
        seen = seen.tril() if scope.causal else seen
    else:
        seen = scope.mask[:, 0].expand(B, S, S)
    assert torch.equal(seen, expected)
    starts = torch.tensor([[bounds[owner[b * S + i]] - b * S for i in range(S)] for b in range(B)])
    assert torch.equal(scope.positions.expand(B, S), torch.arange(S) - starts)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("cu", [None, [0, 550, 700, 900]])
def test_fused_equals_explicit(K: int, window: int | None, cu: list[int] | None) -> None:
    """Values and gradients over 900 keys, more than one block of torch's CPU kernel."""
    S, H, D = 900, 4, 8
    lengths = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    grads = []
    for attend, explicit in ((attend_sdpa, False), (attend_reference, True)):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, S, n, D, requires_grad=True) for n in (H, K, K))
        tokens = torch.zeros(1, S).long()
        scope = make_scope(config(kv_heads=K, sliding_window=window), tokens, lengths, explicit=explicit)
        out = attend(q, k, v, scope)
        assert out.shape == (1, S, H, D)
        out.square().sum().backward()
        grads.append((out, q.grad, k.grad, v.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_scope_has_no_mask_where_none_is_needed() -> None:
    """A boolean (B, 1, S, S) mask costs memory and rules out the fastest kernels."""
    tokens = torch.zeros(2, 8).long()
    rows = torch.tensor([0, 8, 16], dtype=torch.int32)
    assert make_scope(config(), tokens).mask is None
    assert make_scope(config(), tokens, rows).mask is None
    assert make_scope(config(objective="masked"), tokens, rows).mask is None
    assert make_scope(config(), tokens, torch.tensor([0, 3, 8, 16], dtype=torch.int32)).mask is not None
    assert make_scope(config(), tokens, explicit=True).mask is not None
