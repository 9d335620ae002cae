"""Counts from the config against the instantiated model and torch's own counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.config import ModelConfig
from bigtrain.model.build import build_model
from bigtrain.plan.flops import flops_per_token, non_embedding_parameters, parameters, visible_keys

BASE: dict[str, Any] = {"vocab_size": 97, "layers": 3, "width": 32, "heads": 4, "max_length": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "tied": {"tied": True},
    "head_dim": {"head_dim": 24, "kv_heads": 1},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "bias": {"bias": True},
    "gpt2": {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tied": True},
    "layernorm": {"norm": "layernorm"},
    "window": {"sliding_window": 7},
    "masked": {"objective": "masked", "ffn_width": 40},
    "lstm": {"kind": "lstm", "heads": None},
}


def model_config(name: str) -> ModelConfig:
    return ModelConfig(**{**BASE, **MODELS[name]})


@pytest.mark.parametrize("name", MODELS)
def test_parameters_equal_the_model(name: str) -> None:
    config = model_config(name)
    model = build_model(config, device="meta")
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("embed_", "lm_head")))
    assert non_embedding_parameters(config) == inner


@pytest.mark.parametrize("name", [n for n in MODELS if n != "lstm"])
def test_flops_equal_torchs_counter(name: str) -> None:
    """The reference model multiplies every query with every key, which is the `forward` convention."""
    config = model_config(name)
    model = build_model(config, kernels="reference")
    B, S = 2, 24
    tokens = torch.zeros(B, S, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        objective = model(tokens, targets=tokens).objective
    flops = flops_per_token(config, S)
    assert counter.get_total_flops() == flops.forward * B * S
    with counter:
        objective.backward()
    assert counter.get_total_flops() == 2 * flops.forward * B * S
    assert flops.training == 3 * flops.forward


def test_fused_loss_costs_no_extra_products() -> None:
    """Computing the gradient in the forward pass moves the head's products, it adds none."""
    totals = []
    for kernels in ("auto", "reference"):
        model = build_model(model_config("llama"), kernels=kernels)
        tokens = torch.zeros(2, 24, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        with counter:
            model.lm_head(torch.randn(2, 24, 32, requires_grad=True), tokens).objective.backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 3 * 2 * 2 * 24 * 32 * 97


def test_lstm_flops() -> None:
    """Four gates, each from the input and from the state: 8 C^2 products a layer."""
    flops = flops_per_token(ModelConfig(kind="lstm", vocab_size=100, layers=2, width=16), 8)
    assert flops.forward == 2 * (2 * 8 * 16 * 16 + 100 * 16) == flops.forward_visible


@pytest.mark.parametrize("window", [None, 1, 5, 12, 100])
def test_visible_keys_by_counting(window: int | None) -> None:
    config = ModelConfig(**{**BASE, "sliding_window": window})
    S = 12
    counted = sum(j <= i and (window is None or i - j < window) for i in range(S) for j in range(S))
    assert visible_keys(config, S) == counted
    assert visible_keys(model_config("masked"), S) == S * S


def test_visible_flops() -> None:
    config = model_config("llama")
    S = 10
    flops = flops_per_token(config, S)
    attention = 4 * config.layers * config.num_heads * config.dim_per_head
    assert flops.forward - flops.forward_visible == attention * (S - (S + 1) / 2)


def test_six_n_rule() -> None:
    """Training costs about 6 operations per parameter and token when the context is short (Kaplan 2020)."""
    config = ModelConfig(vocab_size=32000, layers=32, width=4096, heads=32, ffn_width=11008, max_length=4096)
    flops = flops_per_token(config, 1)
    used = parameters(config) - config.vocab_size * config.width  # the input embedding is a look-up
    assert abs(flops.training / (6 * used) - 1) < 0.001
