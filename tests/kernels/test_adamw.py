"""AdamW over many tensors against the definition in float64 and torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bigtrain_kernels import adamw as module
from bigtrain_kernels import reference
from bigtrain_kernels.adamw import adamw_, adamw_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 7), (130,), (0,), (), (3, 64)]


def made(
    gradient: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32
) -> list[list[torch.Tensor]]:
    """Parameters, gradients and both moments."""
    g = torch.Generator().manual_seed(0)
    lists = [[torch.randn(shape, generator=g).to(DEVICE, dtype) for shape in SHAPES] for _ in range(4)]
    return [lists[0], [x.to(gradient) for x in lists[1]], lists[2], [x.abs() for x in lists[3]]]


def copied(lists: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[x.clone() for x in some] for some in lists]


def flat(lists: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [x for some in lists for x in some]


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_as_defined(decay: float, gradient: torch.dtype) -> None:
    before = made(gradient)
    options: Any = {"step": 3, "lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay}
    after = copied(before)
    low = [torch.empty_like(x, dtype=torch.bfloat16) for x in after[0]]
    adamw_(*after, **options, scale=torch.tensor(0.5, device=DEVICE), copies=low)
    for p, g, m, v, *found, copy in zip(*before, after[0], *after[2:], low, strict=True):
        wanted = reference.adamw(p.double(), g.double() * 0.5, m.double(), v.double(), **options)
        for one, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, exact.float(), rtol=4 * 2**-23, atol=2**-23)  # four roundings
        assert torch.equal(copy, found[0].bfloat16())


def test_as_torchs_over_steps() -> None:
    lists = made()
    parameters = [x.clone().requires_grad_() for x in lists[0]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    ours = copied(lists)
    moments = [[torch.zeros_like(x) for x in ours[0]] for _ in range(2)]
    for step in range(1, 6):
        for p, g in zip(parameters, lists[1], strict=True):
            p.grad = g / step
        optimizer.step()
        gradients = [g / step for g in lists[1]]
        adamw_(ours[0], gradients, *moments, step=step, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    torch.testing.assert_close(ours[0], [p.detach() for p in parameters])


def test_twice_the_same_bits_and_any_alignment() -> None:
    before = made()
    one, two = copied(before), copied(before)
    shifted = copied(before)
    for some in shifted:
        some[1] = torch.cat([some[1][:1], some[1]])[1:]  # 4 bytes behind an aligned address
    for lists in (one, two, shifted):
        adamw_(*lists, step=1, lr=1e-2)
    for a, b, c in zip(*(flat(lists) for lists in (one, two, shifted)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_by_torchs_rules_and_compiled() -> None:
    lists = made()
    torch.library.opcheck(module._adamw, (*lists, [], None, 1, 1e-2, 0.9, 0.95, 1e-8, 0.1))
    one, two = copied(lists), copied(lists)
    adamw_(*one, step=1, lr=1e-2)

    def step(parameters: Any, gradients: Any, first: Any, second: Any) -> None:
        adamw_(parameters, gradients, first, second, step=1, lr=1e-2)

    torch.compile(step, fullgraph=True, backend="aot_eager")(*two)
    for a, b in zip(flat(one), flat(two), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do_and_bytes() -> None:
    adamw_([], [], [], [], step=1, lr=1e-2)
    assert adamw_bytes(100) == 2800
    assert adamw_bytes(100, gradient=2, copy=2) == 2800


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": []}, "gradients hold 0 tensors, parameters 5"),
        ({"first": [torch.zeros(5, 8)] * 5}, r"first\[0\] has shape \(5, 8\), its parameter \(5, 7\)"),
        ({"parameters": made(dtype=torch.float16)[0]}, r"parameters\[0\] is torch.float16"),
        ({"second": made(dtype=torch.float64)[3]}, r"second\[0\] is torch.float64, expected torch.float32"),
        ({"copies": [x.int() for x in made()[0]]}, r"copies\[0\] is torch.int32"),
        ({"first": [torch.zeros(7, 5).t(), *made()[2][1:]]}, r"first\[0\] is not contiguous"),
        ({"step": 0}, "step is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"scale": torch.zeros(2, device=DEVICE)}, "scale has 2 numbers"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = dict(zip(("parameters", "gradients", "first", "second"), made(), strict=True))
    given |= {"step": 1, "lr": 1e-3, **change}
    lists = [given.pop(name) for name in ("parameters", "gradients", "first", "second")]
    with pytest.raises(ValueError, match=message):
        adamw_(*lists, **given)
