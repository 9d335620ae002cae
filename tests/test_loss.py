"""The summed loss: against torch's cross-entropy, in chunks as in one piece, with its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtrain.config import LossConfig
from bigtrain.model import loss as loss_module
from bigtrain.model.batch import IGNORE
from bigtrain.model.loss import Head, LossSum, reference_loss

C, V = 16, 53


def data(T: int = 40, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, T // 2, C, generator=generator).to(dtype)
    targets = torch.randint(V, (2, T // 2), generator=generator)
    targets[0, :3] = IGNORE
    targets[1, -1] = IGNORE
    return hidden, targets


def head(loss: LossConfig, kernels: str, dtype: torch.dtype = torch.float32, *, bias: bool = False) -> Head:
    torch.manual_seed(1)
    return Head(C, V, loss, kernels=kernels, bias=bias).to(dtype)


SETTINGS = [LossConfig(), LossConfig(z_loss=1e-2), LossConfig(label_smoothing=0.1),
            LossConfig(z_loss=1e-2, label_smoothing=0.2)]  # fmt: skip


@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_reference_equals_torch(loss: LossConfig) -> None:
    hidden, targets = data()
    logits = F.linear(hidden.flatten(0, 1), head(loss, "reference").weight) * 3
    ours = reference_loss(logits, targets.flatten(), loss)
    torch.testing.assert_close(ours.nll, F.cross_entropy(logits, targets.flatten(), reduction="sum"))
    expected = F.cross_entropy(
        logits, targets.flatten(), reduction="sum", label_smoothing=loss.label_smoothing
    )
    z = logits.logsumexp(-1)[targets.flatten() != IGNORE]
    torch.testing.assert_close(ours.objective, expected + loss.z_loss * z.square().sum())


@pytest.mark.parametrize("chunk_tokens", [1, 7, 40, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", SETTINGS, ids=str)
def test_chunks_equal_reference(
    loss: LossConfig, bias: bool, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, whatever the chunk: value and gradients to 1e-12, also under a scaled backward."""
    monkeypatch.setattr(loss_module, "CHUNK_CPU", chunk_tokens * V)
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 1)
    results = []
    for kernels in ("auto", "reference"):
        hidden, targets = data(dtype=torch.float64)
        hidden.requires_grad_()
        module = head(loss, kernels, torch.float64, bias=bias)
        sums = module(hidden, targets)
        assert isinstance(sums, LossSum)
        assert not sums.nll.requires_grad
        (sums.objective * 0.37).backward()
        results.append((*sums, hidden.grad, *(p.grad for p in module.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    loss = LossConfig(z_loss=0.05, label_smoothing=0.1)
    hidden, targets = data(8, torch.float64)
    module = head(loss, "auto", torch.float64)

    def objective(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": w}, (h, targets)).objective

    assert torch.autograd.gradcheck(
        objective, (hidden.requires_grad_(), module.weight.detach().requires_grad_())
    )


def test_ignored_tokens_count_for_nothing() -> None:
    module = head(LossConfig(z_loss=1e-2, label_smoothing=0.1), "auto")
    hidden, targets = data()
    hidden.requires_grad_()
    sums = module(hidden, targets)
    assert isinstance(sums, LossSum)
    sums.objective.backward()
    assert hidden.grad is not None
    assert (hidden.grad[targets == IGNORE] == 0).all()
    assert (hidden.grad[targets != IGNORE].abs().amax(-1) > 0).all()
    nothing = module(hidden, torch.full_like(targets, IGNORE))
    assert isinstance(nothing, LossSum)
    assert nothing.objective.item() == nothing.nll.item() == 0.0


def test_bf16_sums_in_fp32() -> None:
    """16-bit hidden states and weights: the loss of the rounded logits, summed in fp32."""
    hidden, targets = data(400, torch.bfloat16)
    hidden.requires_grad_()
    module = head(LossConfig(), "auto", torch.bfloat16)
    sums = module(hidden, targets)
    assert isinstance(sums, LossSum)
    logits = F.linear(hidden, module.weight).flatten(0, 1).float()
    exact = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    assert sums.nll.dtype == torch.float32
    torch.testing.assert_close(sums.nll, exact.detach(), rtol=1e-6, atol=0)
    sums.objective.backward()
    assert hidden.grad is not None
    assert module.weight.grad is not None
    assert hidden.grad.dtype == module.weight.grad.dtype == torch.bfloat16
    expected = torch.autograd.grad(exact, module.weight)[0]
    error = (module.weight.grad.float() - expected.float()).norm() / expected.float().norm()
    assert error < 0.01


def test_huge_logits_stay_finite() -> None:
    module = head(LossConfig(), "auto")
    with torch.no_grad():
        module.weight *= 1e4
    hidden, targets = data()
    sums = module(hidden.requires_grad_(), targets)
    assert isinstance(sums, LossSum)
    sums.objective.backward()
    assert hidden.grad is not None
    assert sums.nll.isfinite()
    assert hidden.grad.isfinite().all()


def test_no_gradient_is_computed_when_none_is_wanted() -> None:
    module = head(LossConfig(), "auto")
    hidden, targets = data()
    with torch.no_grad():
        sums = module(hidden, targets)
    assert isinstance(sums, LossSum)
    assert not sums.objective.requires_grad
    torch.testing.assert_close(
        sums.nll, reference_loss(module(hidden).flatten(0, 1), targets.flatten(), LossConfig()).nll
    )  # type: ignore[union-attr]


def test_memory_does_not_grow_with_the_logits() -> None:
    """No tensor as large as the logits is alive: the largest allocation is a chunk."""
    T, vocab = 2048, 8192
    module = Head(C, vocab, LossConfig(), kernels="auto")
    hidden = torch.randn(1, T, C, requires_grad=True)
    targets = torch.randint(vocab, (1, T))
    with torch.profiler.profile(profile_memory=True) as profile:
        sums = module(hidden, targets)
        assert isinstance(sums, LossSum)
        sums.objective.backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < T * vocab * 4 / 2
