"""Learning rates, parameter groups and the three update rules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigtrain.config import ModelConfig, OptimConfig
from bigtrain.model.build import build_model
from bigtrain.optim import build_optimizer, learning_rate, materialise_state, parameter_groups, set_step

Schedules = ["cosine", "linear", "wsd", "inverse_sqrt", "constant"]


def curve(total: int = 100, **optim: Any) -> list[float]:
    config = OptimConfig(**optim)
    return [learning_rate(config, 2.0, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", Schedules)
def test_warm_up_rises_linearly_and_reaches_the_peak_in_its_last_step(schedule: str) -> None:
    rates = curve(schedule=schedule, warmup_steps=10)
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_smallest_rate(schedule: str) -> None:
    rates = curve(schedule=schedule, warmup_steps=10, min_lr_ratio=0.1)
    assert rates[-1] == pytest.approx(0.2)
    assert min(rates[10:]) == rates[-1]
    assert learning_rate(OptimConfig(schedule=schedule), 2.0, 1000, 100) == pytest.approx(0.2)


def test_shapes() -> None:
    linear = curve(101, schedule="linear", min_lr_ratio=0.0)
    assert linear[50] == pytest.approx(1.0)
    cosine = curve(101, schedule="cosine", min_lr_ratio=0.0)
    assert cosine[50] == pytest.approx(1.0)
    assert cosine[25] == pytest.approx(1.0 + math.cos(math.pi / 4))
    wsd = curve(schedule="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.0)
    assert wsd[10:80] == [2.0] * 70
    assert wsd[84] == pytest.approx(2.0 * (1 - math.sqrt(5 / 20)))
    assert curve(schedule="wsd")[:90] == [2.0] * 90, "the default decay is a tenth of the run"
    root = curve(schedule="inverse_sqrt", warmup_steps=9)
    assert root[35] == pytest.approx(1.0)
    assert curve(schedule="constant") == [2.0] * 100


@settings(max_examples=200, deadline=None)
@given(
    schedule=st.sampled_from(Schedules),
    warmup=st.integers(0, 50),
    total=st.integers(1, 60),
    decay=st.integers(1, 80),
    ratio=st.floats(0, 1),
    step=st.integers(0, 200),
)
def test_rates_stay_between_zero_and_the_peak(
    schedule: str, warmup: int, total: int, decay: int, ratio: float, step: int
) -> None:
    config = OptimConfig(
        schedule=schedule,
        warmup_steps=warmup,
        min_lr_ratio=ratio,
        decay_steps=decay if schedule == "wsd" else None,
    )
    rate = learning_rate(config, 1.0, step, total)
    assert 0.0 <= rate <= 1.0
    if step >= warmup and schedule in ("cosine", "linear", "wsd"):
        assert rate >= ratio - 1e-12


def llama() -> nn.Module:
    config = ModelConfig(vocab_size=32, layers=2, width=16, heads=2, tied=True, qkv_bias=True, qk_norm=True)
    return build_model(config)


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[tuple[str, float], set[str]]:
    names = {p: name for name, p in model.named_parameters()}
    return {(g["rule"], g["weight_decay"]): {names[p] for p in g["params"]} for g in groups}


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    model = llama()
    found = names_of(model, parameter_groups(model.named_parameters(), OptimConfig()))
    assert found.keys() == {("adamw", 0.1), ("adamw", 0.0)}
    assert all(name.endswith(("norm.weight", "bias")) for name in found["adamw", 0.0])
    assert "embed_tokens.weight" in found["adamw", 0.1]
    assert len(found["adamw", 0.1] | found["adamw", 0.0]) == len(list(model.parameters()))


def test_the_largest_group_comes_first_whichever_parameter_does() -> None:
    """A pipeline's later stages start with a norm."""
    named = [
        ("layers.0.norm.weight", nn.Parameter(torch.ones(8))),
        ("layers.0.w", nn.Parameter(torch.ones(8, 8))),
    ]
    for order in (named, named[::-1]):
        groups = parameter_groups(order, OptimConfig())
        assert [group["params"][0].numel() for group in groups] == [64, 8]


def test_muon_takes_hidden_matrices_only() -> None:
    model = llama()
    found = names_of(model, parameter_groups(model.named_parameters(), OptimConfig(kind="muon")))
    assert found.keys() == {("muon", 0.1), ("adamw", 0.1), ("adamw", 0.0)}
    assert found["adamw", 0.1] == {"embed_tokens.weight"}
    assert all(".layers." in f".{name}" and name.endswith("_proj.weight") for name in found["muon", 0.1])


def one_matrix(**optim: Any) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(6, 4))
    return w, build_optimizer([("layers.0.w", w)], OptimConfig(**optim), lr=0.1)


def test_sgd_is_the_primers_rule() -> None:
    w, optimizer = one_matrix(kind="sgd", momentum=0.0, weight_decay=0.0)
    before, w.grad = w.detach().clone(), torch.randn(6, 4)
    optimizer.step()
    torch.testing.assert_close(w.detach(), before - 0.1 * w.grad, rtol=0, atol=1e-7)


def test_sgd_decay_does_not_enter_the_momentum() -> None:
    w, optimizer = one_matrix(kind="sgd", momentum=0.9, weight_decay=0.5)
    expected, momentum = w.detach().double(), torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(3):
        w.grad = torch.randn(6, 4)
        momentum = 0.9 * momentum + w.grad.double()
        expected = expected - 0.1 * 0.5 * expected - 0.1 * momentum
        optimizer.step()
    torch.testing.assert_close(w.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_adamw_against_the_paper() -> None:
    w, optimizer = one_matrix(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    expected = w.detach().double()
    m, v = torch.zeros(2, 6, 4, dtype=torch.float64)
    for t in range(1, 4):
        w.grad = torch.randn(6, 4)
        g = w.grad.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        update = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-6)
        expected = expected - 0.1 * (update + 0.5 * expected)
        optimizer.step()
    torch.testing.assert_close(w.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_muon_updates_are_orthogonal_with_adamws_size() -> None:
    w, optimizer = one_matrix(kind="muon", weight_decay=0.0)
    before, w.grad = w.detach().clone(), torch.randn(6, 4)
    optimizer.step()
    update = (before - w.detach()) / 0.1
    assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.2), "AdamW's typical root mean square"
    singular = torch.linalg.svdvals(update)
    assert singular.max() / singular.min() < 2.0
    assert torch.linalg.svdvals(w.grad).max() / torch.linalg.svdvals(w.grad).min() > 2.0


@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_materialised_zeros_are_what_the_first_step_starts_from(kind: str) -> None:
    lazy, eager = llama(), llama()
    optimizers = [
        build_optimizer(m.named_parameters(), OptimConfig(kind=kind), lr=0.1) for m in (lazy, eager)
    ]
    for group in optimizers[1].param_groups:
        for p in group["params"]:
            materialise_state(optimizers[1], p, group)
    for _ in range(2):
        for model, optimizer in zip((lazy, eager), optimizers, strict=True):
            torch.manual_seed(1)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(lazy.parameters(), eager.parameters(), strict=True))


def test_the_step_count_is_the_bias_correction() -> None:
    w, optimizer = one_matrix()
    materialise_state(optimizer, w, optimizer.param_groups[0])
    set_step(optimizer, 1000)
    before, w.grad = w.detach().clone(), torch.ones(6, 4)
    optimizer.step()
    moved = (before * (1 - 0.1 * 0.1) - w.detach()).mean()
    assert moved == pytest.approx(0.1 * 0.1 / math.sqrt(0.05), rel=1e-4), (
        "1 - beta1 over the root of 1 - beta2"
    )
