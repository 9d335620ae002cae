"""Norms, SwiGLU and rotary positions against their definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bigtrain_kernels import norm, reference, rope, swiglu
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Run = Callable[..., Any]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def results(run: Run, *parts: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients, of outputs weighted by numbers of their own."""
    leaves = [x.detach().clone().requires_grad_() for x in parts]
    out = run(*leaves)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    sum((o * numbers(*o.shape, seed=9).to(o.dtype)).sum() for o in outs).backward()  # type: ignore[union-attr]
    return [*(o.detach() for o in outs), *(x.grad for x in leaves if x.grad is not None)]


def compare(ours: Run, definition: Run, *parts: torch.Tensor) -> None:
    """No further from float64 than twice what torch is in the same dtype, and a rounding."""
    exact = results(definition, *(x.double() for x in parts))
    torchs, found = results(definition, *parts), results(ours, *parts)
    assert len(found) == len(exact)
    for i, (one, other, wanted) in enumerate(zip(found, torchs, exact, strict=True)):
        assert one.dtype == other.dtype
        assert one.shape == wanted.shape
        error, theirs = (float((x - wanted).abs().max()) for x in (one, other))
        assert error <= 2 * theirs + torch.finfo(one.dtype).eps * float(wanted.abs().max()), (
            i,
            error,
            theirs,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 64), (1, 33), (9, 1)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = numbers(*shape, dtype=dtype), numbers(shape[-1], dtype=dtype, seed=1)
    compare(lambda x, w: norm.rms_norm(x, w, 1e-5), lambda x, w: reference.rms_norm(x, w, 1e-5), x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_the_residual(dtype: torch.dtype) -> None:
    def definition(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + r
        return reference.rms_norm(total, w, 1e-5), total

    parts = [numbers(11, 48, dtype=dtype, seed=i) for i in range(2)] + [numbers(48, dtype=dtype, seed=3)]
    compare(lambda x, r, w: norm.rms_norm_residual(x, r, w, 1e-5), definition, *parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 96), (3, 5, 64), (1, 33), (9, 3)])
def test_layer_norm(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    parts = [numbers(*shape, dtype=dtype), *(numbers(shape[-1], dtype=dtype, seed=i) for i in (1, 2))]
    compare(
        lambda x, w, *b: norm.layer_norm(x, w, *b, eps=1e-5),
        lambda x, w, *b: reference.layer_norm(x, w, b[0] if b else None, 1e-5),
        *parts[: 2 + bias],
    )


def test_layer_norm_with_the_residual() -> None:
    def definition(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
        return reference.layer_norm(x + r, w, b, 1e-5), x + r

    parts = [numbers(11, 48, seed=i) for i in range(2)] + [numbers(48, seed=i) for i in (3, 4)]
    compare(lambda x, r, w, b: norm.layer_norm_residual(x, r, w, b, 1e-5), definition, *parts)


def test_as_torchs_norms() -> None:
    x, weight, bias = numbers(9, 40) + 3, numbers(40, seed=1), numbers(40, seed=2)
    torch.testing.assert_close(norm.layer_norm(x, weight, bias), F.layer_norm(x, (40,), weight, bias))
    torch.testing.assert_close(norm.rms_norm(x, weight), F.rms_norm(x, (40,), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 96), (2, 3, 50), (1,)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(
        swiglu.swiglu, reference.swiglu, numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype, seed=1)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "D"), [(4, 32), (3, 20), (1, 2)])
def test_rotary_positions(H: int, D: int, dtype: torch.dtype) -> None:
    angles = numbers(9, D // 2, seed=4) * 3
    tables = angles.cos(), angles.sin()
    compare(
        lambda x: rope.rotate(x, *tables),
        lambda x: reference.rotate(x, *tables),
        numbers(9, H, D, dtype=dtype),
    )


def cases() -> dict[str, tuple[Run, list[torch.Tensor]]]:
    angles = numbers(6, 8, seed=4)
    tables = angles.cos(), angles.sin()
    return {
        "rms_norm": (norm.rms_norm, [numbers(6, 16), numbers(16, seed=1)]),
        "rms_norm_residual": (
            norm.rms_norm_residual,
            [numbers(6, 16), numbers(6, 16, seed=2), numbers(16)],
        ),
        "layer_norm": (norm.layer_norm, [numbers(6, 16), numbers(16, seed=1), numbers(16, seed=2)]),
        "layer_norm_residual": (
            norm.layer_norm_residual,
            [numbers(6, 16), numbers(6, 16, seed=2), numbers(16), numbers(16, seed=3)],
        ),
        "swiglu": (swiglu.swiglu, [numbers(6, 16), numbers(6, 16, seed=1)]),
        "rotate": (lambda x: rope.rotate(x, *tables), [numbers(6, 2, 16)]),
    }


@pytest.mark.parametrize("name", cases())
def test_repeated_recomputed_and_compiled(name: str) -> None:
    run, parts = cases()[name]
    one, two = results(run, *parts), results(run, *parts)
    again = results(lambda *x: checkpoint(run, *x, use_reentrant=False), *parts)
    compiled = results(torch.compile(run, fullgraph=True, backend="aot_eager"), *parts)
    for a, b, c, d in zip(one, two, again, compiled, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert torch.equal(a, d)


@pytest.mark.parametrize("name", cases())
def test_gradients_by_differences_in_fp64(name: str) -> None:
    run, parts = cases()[name]
    if name == "rotate":
        angles = numbers(6, 8, seed=4).double()
        run = partial(rope.rotate, cos=angles.cos(), sin=angles.sin())
    assert torch.autograd.gradcheck(run, [x.double().requires_grad_() for x in parts])


def test_rotary_tables_that_repeat() -> None:
    angles = numbers(5, 8, seed=4)
    tables = angles.cos(), angles.sin()
    x = numbers(10, 2, 16)
    wanted = rope.rotate(x, *(table.repeat(2, 1) for table in tables))
    assert torch.equal(rope.rotate(x, *tables), wanted)


def test_bytes_moved() -> None:
    x = 6 * 16 * 2
    assert [norm.norm_bytes(6, 16, 2), norm.norm_bytes(6, 16, 2, residual=True)] == [2 * x, 4 * x]
    assert norm.norm_bytes(6, 16, 2, residual=True, backward=True) == 4 * x
    assert [swiglu.swiglu_bytes(96, 2), swiglu.swiglu_bytes(96, 2, backward=True)] == [3 * x, 5 * x]
    assert rope.rotate_bytes(6, 1, 16, 2) == 2 * x + 2 * 6 * 8 * 4


def test_any_strides_and_nothing() -> None:
    wide = numbers(16, 6).t()  # columns in memory
    weight = numbers(16, seed=1)
    assert torch.equal(norm.rms_norm(wide, weight), norm.rms_norm(wide.contiguous(), weight))
    assert torch.equal(swiglu.swiglu(wide, wide), swiglu.swiglu(wide.contiguous(), wide.contiguous()))
    packed = numbers(6, 3, 2, 16)  # q, k and v of one product
    table = torch.ones(6, 8, device=DEVICE)
    parts = packed.unbind(1)
    assert torch.equal(rope.rotate(parts[1], table, table), rope.rotate(parts[1].contiguous(), table, table))
    x = numbers(6, 16).requires_grad_()
    swiglu.swiglu(x, x).sum().backward()  # a gradient of stride 0
    assert x.grad is not None
    none = numbers(0, 16).requires_grad_()
    norm.rms_norm(none, weight.requires_grad_()).sum().backward()
    swiglu.swiglu(none, none).sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_ops_follow_torchs_rules() -> None:
    x, weight = numbers(6, 16).requires_grad_(), numbers(16).requires_grad_()
    table = torch.ones(6, 8, device=DEVICE)
    torch.library.opcheck(norm._norm, (x, None, weight, None, 1e-6, False))
    torch.library.opcheck(norm._norm, (x, x.detach(), weight, weight, 1e-6, True))
    torch.library.opcheck(swiglu._swiglu, (x, numbers(6, 16).requires_grad_()))
    dense = numbers(6, 16)
    mean = norm._norm(dense, None, weight, weight, 1e-6, True)[2:]  # type: ignore[operator]
    torch.library.opcheck(norm._norm_backward, (dense, dense, dense, weight.detach(), *mean, True))
    torch.library.opcheck(swiglu._swiglu_backward, (dense, dense, dense))
    torch.library.opcheck(rope._rotate, (numbers(6, 2, 16).requires_grad_(), table, table, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: norm.rms_norm(numbers(6, 16), numbers(15)),
            r"weight has shape \(15,\), expected \(16,\)",
        ),
        (lambda: norm.rms_norm(numbers(6, 16).int(), numbers(16)), "x is torch.int32"),
        (lambda: norm.rms_norm(numbers(6, 9000), numbers(9000)), "x has width 9000, expected 1 to 8192"),
        (lambda: norm.layer_norm(numbers(6, 16), numbers(16), numbers(15)), r"bias has shape \(15,\)"),
        (
            lambda: norm.layer_norm(numbers(6, 16), numbers(16), numbers(16).double()),
            "bias is torch.float64, the weight is torch.float32",
        ),
        (lambda: norm.rms_norm(numbers(6, 16), numbers(16), 0.0), "eps is 0.0"),
        (
            lambda: norm.rms_norm_residual(numbers(6, 16), numbers(5, 16), numbers(16)),
            "residual has shape",
        ),
        (
            lambda: swiglu.swiglu(numbers(6, 16), numbers(6, 15)),
            r"up has shape \(6, 15\), gate has \(6, 16\)",
        ),
        (lambda: rope.rotate(numbers(6, 2, 15), numbers(6, 7), numbers(6, 7)), "x has head dim 15"),
        (
            lambda: rope.rotate(numbers(6, 2, 16), numbers(6, 7), numbers(6, 8)),
            r"cos has shape \(6, 7\), expected \(6, 8\)",
        ),
        (lambda: rope.rotate(numbers(6, 2, 16), numbers(4, 8), numbers(4, 8)), "fewer rows that divide 6"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
