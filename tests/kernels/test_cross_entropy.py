"""Cross-entropy of given logits against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bigtrain_kernels import cross_entropy as module
from bigtrain_kernels import reference
from bigtrain_kernels.cross_entropy import cross_entropy, cross_entropy_bytes
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 3.0}]


def made(T: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(T, V, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(0, V, (T,), generator=g).to(DEVICE)
    targets[::7] = -100
    return logits, targets


def results(run: Any, logits: torch.Tensor, *rest: Any, **options: Any) -> list[torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = run(leaf, *rest, **options)
    (loss * torch.linspace(0.5, 2, len(loss), device=loss.device, dtype=loss.dtype)).sum().backward()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_as_defined(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, targets = made(41, 131, dtype)
    exact = results(reference.cross_entropy, logits.double(), targets, **options)
    torchs = results(reference.cross_entropy, logits, targets, **options)
    ours = results(cross_entropy, logits, targets, reduction="none", **options)
    for one, other, wanted in zip(ours, torchs, exact, strict=True):
        error, theirs = ((x - wanted).abs().max() for x in (one, other))
        assert error <= 2 * theirs + torch.finfo(one.dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_as_torch(reduction: str) -> None:
    logits, targets = made(30, 70)
    wanted = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.1)
    torch.testing.assert_close(
        cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.1), wanted
    )  # type: ignore[arg-type]


def test_gradients_by_differences_in_fp64() -> None:
    logits, targets = made(6, 11, torch.float64)
    for options in OPTIONS:
        run = lambda x: cross_entropy(x, targets, reduction="none", **options)  # type: ignore[arg-type]  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, [logits.requires_grad_()])


def test_repeated_recomputed_compiled_and_by_the_rules() -> None:
    logits, targets = made(20, 33)

    def run(x: torch.Tensor) -> torch.Tensor:
        return cross_entropy(x * 1.5, targets, reduction="none")

    found = [
        results(run, logits),
        results(run, logits),
        results(lambda x: checkpoint(run, x, use_reentrant=False), logits),
        results(torch.compile(run, fullgraph=True, backend="aot_eager"), logits),
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    arguments = (logits.requires_grad_(), targets, -100, 0.1, 0.0, 0.0)
    torch.library.opcheck(module._cross_entropy, arguments)
    loss, lse = module._cross_entropy(logits.detach(), *arguments[1:])  # type: ignore[operator]
    torch.library.opcheck(
        module._cross_entropy_backward, (loss, logits.detach(), targets, lse, *arguments[2:])
    )


def test_strides_no_token_and_values_that_are_not_finite() -> None:
    logits, targets = made(20, 33)
    assert torch.equal(cross_entropy(logits.t().contiguous().t(), targets), cross_entropy(logits, targets))
    wide = torch.full((20, 40), torch.nan, device=DEVICE)
    wide[:, :33] = logits
    found = results(cross_entropy, wide[:, :33], targets, reduction="none")
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, results(cross_entropy, logits, targets, reduction="none"), strict=True)
    )
    leaf = wide.requires_grad_()
    cross_entropy(leaf[:, :33], targets).backward()  # rows that are not dense, and a gradient of stride 0
    assert leaf.grad is not None
    assert not leaf.grad[:, 33:].any()
    assert float(cross_entropy(logits[:0], targets[:0], reduction="sum")) == 0
    logits[1] = torch.nan
    assert cross_entropy(logits, targets).isnan()
    assert (
        cross_entropy_bytes(20, 33, 2, backward=True) == 2 * cross_entropy_bytes(20, 33, 2) == 2 * 20 * 33 * 2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(20)}, "logits has 1 dimensions"),
        ({"logits": torch.zeros(20, 33, dtype=torch.int32)}, "logits is torch.int32"),
        ({"targets": torch.zeros(19, dtype=torch.int64)}, r"targets has shape \(19,\), expected \(20,\)"),
        (
            {"targets": torch.full((20,), -3)},
            r"targets hold \[-3, -3, -3, -3, -3\], outside the vocabulary of 33",
        ),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"reduction": "all"}, "reduction is 'all'"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "logits": torch.zeros(20, 33),
        "targets": torch.zeros(20, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        cross_entropy(given.pop("logits"), given.pop("targets"), **given)
