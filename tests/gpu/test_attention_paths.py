"""Attention's kernels for Hopper against the portable ones, on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bigtrain_kernels.attention_probe import allowed, main

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CAPABILITY[0] != 9, reason="needs a Hopper GPU, and there is none here"),
]


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, 0), (0, 0), (7, 300)])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ([256], [256]),
        ([1], [1]),
        ([129, 0, 1, 700], [129, 0, 1, 700]),
        ([5, 300, 64, 40], [900, 100, 0, 41]),
        ([4096, 4097], [4096, 4097]),
    ],
)
def test_hopper_is_portable(
    queries: list[int], keys: list[int], window: tuple[int, int], dtype: torch.dtype, D: int
) -> None:
    from bigtrain_kernels import (
        attention_backward,
        attention_forward,
        attention_hopper,
        attention_hopper_backward,
    )

    H, K = 8, 2
    torch.manual_seed(0)
    q = torch.randn(1, sum(queries), H, D, device="cuda", dtype=dtype)
    k, v = (torch.randn(1, sum(keys), K, D, device="cuda", dtype=dtype) for _ in range(2))
    cus = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32).cuda() for x in (queries, keys)]
    for sinks in (None, torch.linspace(-1, 2, H, device="cuda")):
        options: dict[str, Any] = {"scale": D**-0.5, "left": window[0], "right": window[1]}
        out, lse = attention_forward.forward(q, k, v, *cus, sinks, **options, softcap=0.0)
        found, found_lse = attention_hopper.forward(q, k, v, *cus, sinks, **options)
        again, _ = attention_hopper.forward(q, k, v, *cus, sinks, **options)
        assert torch.equal(found, again)
        torch.testing.assert_close(found_lse, lse, atol=2e-5, rtol=1e-5)
        unit = torch.finfo(dtype).eps
        assert (found.float() - out.float()).abs().max() <= 2 * unit * max(1.0, float(v.abs().max()))
    grad = torch.randn_like(q)
    given = (grad, torch.randn_like(lse), q, k, v, out, lse, *cus)
    theirs = attention_backward.backward(*given, **options, softcap=0.0)
    for _ in range(2):
        ours = attention_backward.backward(*given, **options, softcap=0.0, kernels=attention_hopper_backward)
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            assert (a.float() - b.float()).norm() <= allowed(dtype) * b.float().norm() + 1e-6


def test_the_probe_finds_nothing() -> None:
    assert main(torch.device("cuda", 0)) == ""


def test_hopper_is_portable_for_rows_of_one_length() -> None:
    from bigtrain_kernels import attention_forward, attention_hopper

    q = torch.randn(3, 500, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (
        torch.randn(3, 2, 700, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)
    )
    options: dict[str, Any] = {"scale": 0.1, "left": -1, "right": 0}
    out, lse = attention_forward.forward(q, k, v, None, None, None, **options, softcap=0.0)
    found, found_lse = attention_hopper.forward(q, k, v, None, None, None, **options)
    torch.testing.assert_close(found_lse, lse, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found, out, atol=2e-2, rtol=0)
