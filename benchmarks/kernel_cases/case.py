"""What benchmarks/kernels.py measures: one piece of work, ours and every peer that can do it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # cpu: in the interpreter, to try the checks
Run = Callable[[], Any]


@dataclass(frozen=True)
class KernelCase:
    """One shape of one piece of work."""

    name: str
    work: int
    """Floating-point operations or bytes, by the formula that holds for every implementation."""
    unit: str
    """"TFLOP/s" or "GB/s": what `work` over the time is told in."""
    prepare: Callable[[int], dict[str, Run]]
    """Fresh random inputs from a seed, and each implementation ready to be timed on them; ours begin with "bigtrain".
    One that this machine lacks is left out; one that fails raises when it is run.
    """
    check: Callable[[int], float]
    """Ours against float64 on smaller fresh inputs, outputs poisoned: the error over what is allowed, at most 1."""
    aims: dict[str, float] = field(default_factory=dict)
    """By the name of a peer: how many times as fast ours should be. "ceiling": the share of the measured one."""
    memory_aims: dict[str, float] = field(default_factory=dict)
    """By the name of a peer: the largest share of its memory that ours may take."""


def poison(device: torch.device | str = DEVICE, size: int = 1 << 24) -> None:
    """Leave NaN in the memory that the next outputs get: what a kernel does not write shows."""
    blocks = [
        torch.full((size // 16 >> i,), torch.nan, dtype=torch.float32, device=device) for i in range(12)
    ]
    del blocks


def installed(package: str) -> bool:
    """Whether a peer is here."""
    return importlib.util.find_spec(package) is not None


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """By torch.compile, once for all cases."""
    return torch.compile(function, dynamic=False)


def runs_of(
    functions: dict[str, Callable[..., Any]], leaves: list[torch.Tensor], part: str
) -> dict[str, Run]:
    """Runs of functions of `leaves`: "forward", without a graph, "backward" of a result that is there, or "both"."""
    for leaf in leaves:
        leaf.requires_grad_()
    gradients: list[torch.Tensor] = []

    def grad_of(out: torch.Tensor) -> torch.Tensor:
        if not gradients:
            gradients.append(torch.randn_like(out))
        return gradients[0]

    def forward(f: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return f(*leaves)

    def both(f: Callable[..., Any]) -> Any:
        out = f(*leaves)
        return torch.autograd.grad(out, leaves, grad_of(out))

    def backward(f: Callable[..., Any], graph: list[torch.Tensor]) -> Any:
        if not graph:
            graph.append(f(*leaves))
        return torch.autograd.grad(graph[0], leaves, grad_of(graph[0]), retain_graph=True)

    if part == "backward":
        return {name: partial(backward, f, []) for name, f in functions.items()}
    return {name: partial(forward if part == "forward" else both, f) for name, f in functions.items()}


def excess(ours: Callable[..., Any], definition: Callable[..., Any], parts: list[torch.Tensor]) -> float:
    """The largest error of outputs and gradients, over what is allowed: twice the definition's in the same dtype, and a
    rounding.
    """

    def results(f: Callable[..., Any], dtype: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in parts]
        out = f(*leaves)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        scale = [torch.linspace(0.5, 2, o.numel(), device=o.device).view_as(o) for o in outs]
        total = sum((o * s.to(o.dtype)).sum() for o, s in zip(outs, scale, strict=True))
        return [*(o.detach() for o in outs), *torch.autograd.grad(total, leaves)]  # type: ignore[arg-type]

    exact, rough = results(definition, torch.float64), results(definition, None)
    poison()
    worst = 0.0
    for found, torchs, wanted in zip(results(ours, None), rough, exact, strict=True):
        allowed = 2 * (torchs - wanted).abs().max() + torch.finfo(found.dtype).eps * wanted.abs().max()
        error = float((found - wanted).abs().max() / allowed)
        worst = max(worst, error if error == error else float("inf"))
    return worst
