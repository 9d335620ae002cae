"""Attention: see compile_gate.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from bigtrain_kernels import attention as _  # noqa: F401  registers the operators

from tests.kernels.compile_gate import Case

PRODUCTS = "HGMMA"


def launches(
    D: int,
    *,
    packed: bool = True,
    window: tuple[int, int] = (-1, 0),
    softcap: float = 0.0,
    sinks: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    G: int = 4,
) -> Callable[[], None]:
    """The forward and the backward pass, with the arguments of a training step."""

    def run() -> None:
        q = torch.zeros(1 if packed else 2, 256, 2 * G, D, dtype=dtype)
        k = torch.zeros(q.shape[0], 256, 2, D, dtype=dtype)
        cu = torch.tensor([0, 100, 256], dtype=torch.int32) if packed else None
        sink = torch.zeros(2 * G) if sinks else None
        out, lse = torch.ops.bigtrain.attention(q, k, k, cu, cu, sink, D**-0.5, *window, softcap)
        torch.ops.bigtrain.attention_backward(q, lse, q, k, k, out, lse, cu, cu, D**-0.5, *window, softcap)

    return run


def case(D: int, quick: bool = False, **options: object) -> Case:
    words = " ".join(f"{name}={value}" for name, value in options.items())
    needs = {
        "attention_forward": PRODUCTS,
        "attention_delta": "LDG.E.128",
        "attention_backward_queries": PRODUCTS,
        "attention_backward_keys": PRODUCTS,
    }
    return Case(f"D{D} {words}".strip(), launches(D, **options), needs, quick)  # type: ignore[arg-type]


def hopper(D: int, quick: bool = False, packed: bool = True, sinks: bool = False, **options: Any) -> Case:
    """The kernels in Gluon, which are launched as attention_path.py would have it."""

    def run() -> None:
        from bigtrain_kernels import attention_hopper, attention_hopper_backward
        from bigtrain_kernels.attention_backward import Numbers

        q = torch.zeros(1 if packed else 2, 256, 8, D, dtype=options.get("dtype", torch.bfloat16))
        k = torch.zeros(q.shape[0], 256, 2, D, dtype=q.dtype)
        cu = torch.tensor([0, 100, 256], dtype=torch.int32) if packed else None
        left, right = options.get("window", (-1, 0))
        sink = torch.zeros(8) if sinks else None
        lse = attention_hopper.forward(q, k, k, cu, cu, sink, scale=D**-0.5, left=left, right=right)[1]
        given = (q, k, k, q, lse, lse, cu, cu, Numbers(D**-0.5, left, right, 0.0))
        attention_hopper_backward.queries_gradient(*given)
        attention_hopper_backward.keys_gradient(*given)

    words = " ".join(
        f"{name}={value}" for name, value in {"packed": packed, "sinks": sinks, **options}.items()
    )
    names = ("forward", "backward_queries", "backward_keys")
    return Case(f"hopper D{D} {words}", run, {f"attention_{name}_hopper": PRODUCTS for name in names}, quick)


CASES = [
    case(128, quick=True),
    case(64, quick=True),
    hopper(128, quick=True),
    *(hopper(D, packed=packed) for D in (64, 128) for packed in (True, False)),
    *(hopper(D, window=window, sinks=True) for D in (64, 128) for window in ((-1, -1), (1024, 0))),
    *(hopper(D, dtype=torch.float16, packed=False, window=(-1, -1)) for D in (64, 128)),
    *(
        case(D, packed=packed, window=window)
        for D, packed, window in itertools.product(
            (32, 64, 128, 256), (True, False), ((-1, -1), (-1, 0), (1024, 0))
        )
    ),
    *(case(D, window=(128, 0), softcap=30.0, sinks=True) for D in (32, 64, 128, 256)),
    *(case(D, dtype=torch.float16, G=1, packed=False) for D in (64, 128, 256)),
    *(case(D) for D in (80, 96, 192)),
]
