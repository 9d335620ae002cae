"""The LSTM lesson: the primer's network, dropout that no layout changes, documents that stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bigtrain.config import ModelConfig
from bigtrain.model.build import build_model
from bigtrain.model.lstm import LSTM

V, C, LAYERS = 61, 24, 2


def make(dropout: float = 0.0, seed: int = 3, **options: Any) -> LSTM:
    config = ModelConfig(kind="lstm", vocab_size=V, layers=LAYERS, width=C, dropout=dropout, init_std=1.0)
    model = build_model(config, seed=seed, **options)
    assert isinstance(model, LSTM)
    return model


def tokens(B: int, S: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed))


class Primer(nn.Module):
    """The example as the primer writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, C)
        self.lstm = nn.LSTM(C, C, num_layers=LAYERS, batch_first=True)
        self.linear = nn.Linear(C, V)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.lstm(self.embedding(x))[0])


def test_equals_the_primers_network() -> None:
    model, primer = make().eval(), Primer()
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in primer.named_parameters():
            module, last = name.split(".")
            if module == "lstm":
                layer = last[-1]
                name = f"layers.{layer}.{last[:-1]}0"
            else:
                name = {"embedding": "embed_tokens", "linear": "lm_head"}[module] + "." + last
            parameter.copy_(ours[name])
    x = tokens(3, 17)
    torch.testing.assert_close(model(x), primer(x))


def test_starts_like_pytorch() -> None:
    """Every weight of the LSTM and the linear is uniform within 1 / sqrt(width); the embedding is normal."""
    for name, parameter in make().named_parameters():
        if name == "embed_tokens.weight":
            assert 0.9 < parameter.std() < 1.1
        else:
            bound = C**-0.5
            assert 0.8 * bound < parameter.abs().max() <= bound
            assert abs(parameter.std().item() - bound / 3**0.5) < 0.1 * bound


def test_causal() -> None:
    model = make().eval()
    x = tokens(2, 12)
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % V
    difference = (model(x) - model(changed)).abs().amax((0, 2))
    assert (difference[:7] == 0).all()
    assert (difference[7:] > 0).all()


def test_documents_do_not_see_each_other() -> None:
    model = make().eval()
    x = tokens(2, 20)
    cu = torch.tensor([0, 8, 20, 25, 40], dtype=torch.int32)
    changed = x.clone()
    changed[0, :8] = (changed[0, :8] + 1) % V
    before, after = model(x, cu_seqlens=cu), model(changed, cu_seqlens=cu)
    assert (before[0, 8:] == after[0, 8:]).all()
    assert (before[1] == after[1]).all()
    assert (before[0, :8] != after[0, :8]).any()
    for row, start, stop in ((0, 0, 8), (0, 8, 20), (1, 0, 5), (1, 5, 20)):
        alone = model(x[row : row + 1, start:stop])
        torch.testing.assert_close(before[row : row + 1, start:stop], alone, rtol=0, atol=1e-5)


def test_gradient_through_segments_equals_documents_alone() -> None:
    model = make().eval()
    x, y = tokens(2, 10), tokens(2, 10, seed=1)
    cu = torch.tensor([0, 4, 10, 20], dtype=torch.int32)
    model(x, targets=y, cu_seqlens=cu).objective.backward()
    packed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for row, start, stop in ((0, 0, 4), (0, 4, 10), (1, 0, 10)):
        model(x[row : row + 1, start:stop], targets=y[row : row + 1, start:stop]).objective.backward()
    for a, p in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-5)


def test_dropout_is_a_function_of_seed_and_sample() -> None:
    model = make(dropout=0.2).train()
    ids = torch.tensor([7, 123456789, 42])
    x, y = tokens(3, 16), tokens(3, 16, seed=1)
    whole = model(x, sample_ids=ids)
    torch.manual_seed(99)  # a global generator plays no part
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(x[order], sample_ids=ids[order]), whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x[1:2], sample_ids=ids[1:2]), whole[1:2], rtol=0, atol=1e-5)
    assert (model(x, sample_ids=ids + 1) - whole).abs().max() > 0.01
    other = make(dropout=0.2, seed=4).train()
    other.load_state_dict(model.state_dict())
    assert (other(x, sample_ids=ids) - whole).abs().max() > 0.01
    with pytest.raises(AssertionError, match="sample_ids"):
        model(x, targets=y)


def test_dropout_masks_are_random_enough() -> None:
    model = make(dropout=0.2)
    ids = torch.arange(200)
    masks = torch.stack([model.dropout_mask(ids, 50, layer) for layer in range(2)])
    kept = masks > 0
    assert masks.unique().tolist() == [0.0, pytest.approx(1.25, rel=1e-4)]
    n = kept.numel()
    assert abs(kept.double().mean().item() - 0.8) < 5 * (0.16 / n) ** 0.5
    signal = (kept.double() - 0.8) / 0.4
    for dim in range(4):  # layer, sample, position, feature: neighbours are independent
        a, b = signal.narrow(dim, 0, signal.shape[dim] - 1), signal.narrow(dim, 1, signal.shape[dim] - 1)
        assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5


def test_no_dropout_in_eval_mode() -> None:
    x = tokens(2, 8)
    with_dropout, without = make(dropout=0.5).eval(), make().eval()
    assert torch.equal(with_dropout(x), without(x))


def test_cache_continues() -> None:
    """Rows of unequal length, then single tokens: the logits are the full forward's."""
    model = make().eval()
    x = tokens(2, 12)
    full = model(x)
    cache = model.new_cache(2, 12)
    cache.expect([5, 3])
    padded = x[:, :5].clone()
    padded[1, 3:] = 0
    first = model(padded, cache=cache)
    torch.testing.assert_close(first[0], full[0, :5], rtol=0, atol=1e-5)
    torch.testing.assert_close(first[1, :3], full[1, :3], rtol=0, atol=1e-5)
    for step in range(6):
        rows = torch.stack((x[0, 5 + step], x[1, 3 + step]))[:, None]
        logits = model(rows, cache=cache)[:, 0]
        expected = torch.stack((full[0, 5 + step], full[1, 3 + step]))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == [11, 9]
