"""Linear layer + cross-entropy against the definition in float64, in one process and split over the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bigtrain_kernels import linear_cross_entropy as module
from bigtrain_kernels import reference
from bigtrain_kernels.linear_cross_entropy import linear_cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.runs.worlds import run_world

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = 1
"""A budget so small that chunks have the fewest tokens."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEWEST", 16)


def made(T: int, C: int, V: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden, weight, targets, some of them ignored."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, C, generator=g).to(DEVICE, dtype)
    weight = (torch.randn(V, C, generator=g) * 2 / C**0.5).to(DEVICE, dtype)
    targets = torch.randint(0, V, (T,), generator=g).to(DEVICE)
    targets[::7] = -100
    return hidden, weight, targets


def by_definition(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str = "mean", **options: Any
) -> torch.Tensor:
    loss = reference.cross_entropy(hidden @ weight.t(), targets, **options)
    if reduction == "mean":
        return loss.sum() / (targets != options.get("ignore_index", -100)).sum()
    return loss.sum() if reduction == "sum" else loss


def results(
    run: Any, hidden: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any
) -> list[torch.Tensor]:
    """Loss and gradients, of a loss that is weighted by token where it is one."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    loss = run(*leaves, *rest, **options)
    (
        loss * torch.linspace(0.5, 2, loss.numel(), device=loss.device, dtype=loss.dtype).view_as(loss)
    ).sum().backward()
    return [loss.detach(), *(x.grad for x in leaves if x.grad is not None)]


OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 3.0}, {"ignore_index": 5},
           {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 2.0}]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_defined(reduction: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    parts = made(41, 24, 131, dtype)
    parts[2][parts[2] == -100] = options.get("ignore_index", -100)
    exact = results(by_definition, *(x.double() for x in parts[:2]), parts[2], reduction=reduction, **options)
    torchs = results(by_definition, *parts, reduction=reduction, **options)
    ours = results(linear_cross_entropy, *parts, reduction=reduction, budget=SMALL, **options)
    for name, one, other, wanted in zip(("loss", "hidden", "weight"), ours, torchs, exact, strict=True):
        assert one.dtype == (torch.float32 if name == "loss" else dtype)
        error, theirs = ((x - wanted).abs().max() for x in (one, other))
        allowed = 2 * theirs + torch.finfo(one.dtype).eps * wanted.abs().max()
        assert error <= allowed, f"{name}: {float(error):.2e}, torch {float(theirs):.2e}"


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_bias(reduction: str) -> None:
    hidden, weight, targets = made(41, 24, 131, torch.float32)
    bias = torch.randn(131, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    wanted = reference.cross_entropy(leaves[0] @ leaves[1].t() + leaves[2], targets)
    ours = [x.requires_grad_() for x in (hidden, weight, bias)]
    found = linear_cross_entropy(*ours[:2], targets, bias=ours[2], reduction=reduction, budget=SMALL)
    scale = torch.linspace(0.5, 2, 41, device=DEVICE, dtype=torch.float64) if reduction == "none" else 1.0
    grads = torch.autograd.grad((wanted * scale).sum(), leaves)
    for a, b in zip(torch.autograd.grad((found * scale).sum(), ours), grads, strict=True):
        torch.testing.assert_close(a, b.float())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_plain_cross_entropy_beside_what_is_minimised(reduction: str) -> None:
    parts = made(41, 24, 131, torch.float32)
    parts[0].requires_grad_()
    options: Any = {"label_smoothing": 0.1, "z_loss": 1e-2}
    loss, nll = linear_cross_entropy(*parts, reduction=reduction, return_nll=True, **options)
    assert loss.requires_grad
    assert not nll.requires_grad
    torch.testing.assert_close(nll, by_definition(*parts, reduction=reduction).detach())
    torch.testing.assert_close(loss, by_definition(*parts, reduction=reduction, **options))


def test_operations_are_counted() -> None:
    hidden, weight, targets = made(41, 24, 131, torch.float32)
    for learning, products in ((False, 1), (True, 3)):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden.requires_grad_(learning), weight, targets)
        assert counter.get_total_flops() == products * 2 * 41 * 24 * 131


def test_gradients_by_differences_in_fp64() -> None:
    hidden, weight, targets = made(5, 4, 9, torch.float64)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    for reduction in ("sum", "none"):
        options: Any = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "reduction": reduction}
        assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, **options), leaves)  # noqa: B023


def test_as_torch() -> None:
    hidden, weight, targets = made(50, 16, 97, torch.float32)
    wanted = F.cross_entropy(hidden @ weight.t(), targets, label_smoothing=0.1)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, label_smoothing=0.1), wanted)


def test_the_size_of_the_chunks_does_not_matter_and_the_bits_are_the_same_every_time() -> None:
    parts = made(70, 16, 97, torch.float32)
    one, two = (results(linear_cross_entropy, *parts, budget=SMALL) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    torch.testing.assert_close(results(linear_cross_entropy, *parts), one)


def test_nothing_counts_and_no_tokens() -> None:
    hidden, weight, targets = made(20, 16, 33, torch.float32)
    ignored = torch.full_like(targets, -100)
    hidden[3] = torch.inf  # an ignored row may hold anything
    loss, dh, dw = results(linear_cross_entropy, hidden, weight, ignored, reduction="sum")
    assert float(loss) == 0
    assert not dh.any()
    assert not dw.isinf().any()
    assert linear_cross_entropy(hidden, weight, ignored).isnan()
    none = linear_cross_entropy(hidden[:0].requires_grad_(), weight, targets[:0], reduction="sum")
    none.backward()
    assert float(none.detach()) == 0


def test_a_value_that_is_not_finite_is_seen() -> None:
    hidden, weight, targets = made(20, 16, 33, torch.float32)
    hidden[1] = torch.nan
    assert linear_cross_entropy(hidden, weight, targets).isnan()


def test_inference_keeps_no_gradient() -> None:
    hidden, weight, targets = made(20, 16, 33, torch.float32)
    assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_recomputed_and_compiled() -> None:
    hidden, weight, targets = made(20, 16, 33, torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def run(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h * 1.5, w, targets)

    wanted = torch.autograd.grad(run(*leaves), leaves)
    again = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False), leaves)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), wanted)


def test_the_op_follows_torchs_rules() -> None:
    hidden, weight, targets = made(20, 16, 33, torch.float32)
    for wanted in (True, False):
        args = (
            hidden,
            weight,
            weight[:, 0].contiguous(),
            targets,
            torch.ones(20, device=DEVICE),
            -100,
            0.1,
            0.0,
            0.0,
            0,
            33,
            "",
            True,
            1 << 20,
            wanted,
        )
        torch.library.opcheck(module._linear_cross_entropy, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 5, 6)}, "hidden has 3 dimensions"),
        ({"hidden": torch.zeros(20, 16, dtype=torch.int32)}, "hidden is torch.int32"),
        ({"weight": torch.zeros(33, 17)}, "weight has width 17, hidden has 16"),
        (
            {"weight": torch.zeros(33, 16, dtype=torch.bfloat16)},
            "weight is torch.bfloat16, hidden is torch.float32",
        ),
        ({"targets": torch.zeros(19, dtype=torch.int64)}, r"targets has shape \(19,\), expected \(20,\)"),
        ({"targets": torch.zeros(20)}, "targets is torch.float32, expected int64"),
        (
            {"targets": torch.full((20,), 33)},
            r"targets hold \[33, 33, 33, 33, 33\], outside the vocabulary of 33",
        ),
        ({"bias": torch.zeros(32)}, r"bias has shape \(32,\), expected \(33,\)"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"reduction": "average"}, "reduction is 'average'"),
        ({"first": 3}, "first is 3: 33 rows from there on do not lie in a vocabulary of 33"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"hidden": torch.zeros(20, 16), "weight": torch.zeros(33, 16)}
    given |= {"targets": torch.zeros(20, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


@pytest.mark.parametrize("world", [2, 4])
def test_a_vocabulary_split_over_ranks(world: int, tmp_path: Path) -> None:
    """Loss and gradients of the single version, at a vocabulary that does not divide."""
    run_world(["-m", "tests.kernels.vocabulary_worker", str(tmp_path)], world, timeout=120)
    parts = made(41, 24, 131, torch.float32)
    for i, options in enumerate(OPTIONS[:4]):
        for reduction in ("mean", "none"):
            loss, dh, dw = results(linear_cross_entropy, *parts, reduction=reduction, **options)
            files = [tmp_path / f"{i}-{reduction}-{rank}.pt" for rank in range(world)]
            found = [torch.load(file, weights_only=True) for file in files]
            shares = sum(one[3] for one in found)  # with sum_hidden=False
            assert (shares - dh).abs().max() <= 1e-6 * dh.abs().max()
            for one in found:
                assert (one[0] - loss).abs().max() <= 1e-6 * loss.abs().max()
                assert (one[1] - dh).abs().max() <= 1e-6 * dh.abs().max()
            assert (torch.cat([one[2] for one in found]) - dw).abs().max() <= 1e-6 * dw.abs().max()
