"""Linear layer + cross-entropy, forward and backward, against whole logits, Liger and Cut Cross-Entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bigtrain_kernels import reference
from bigtrain_kernels.linear_cross_entropy import linear_cross_entropy

from benchmarks.kernel_cases.case import DEVICE, KernelCase, Run, compiled, excess, installed

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def made(T: int, C: int, V: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(T, C, generator=g, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(V, C, generator=g, device=DEVICE, dtype=torch.bfloat16) / C**0.5
    return [hidden, weight, torch.randint(0, V, (T,), generator=g, device=DEVICE)]


def peers() -> dict[str, Loss]:
    """What can be had here."""
    found: dict[str, Loss] = {"torch": whole_logits, "compile": compiled(whole_logits)}
    if installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger: Any = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    if installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cce"] = cut
        found["cce-exact"] = partial(cut, impl="cce_kahan_full_c")
    return found


def products(hidden: torch.Tensor, weight: torch.Tensor, slopes: torch.Tensor) -> None:
    """The three matrix products, without which nobody gets there, on whole logits."""
    F.linear(hidden, weight)
    slopes @ weight
    slopes.t() @ hidden


def loss(T: int, C: int, V: int, aims: dict[str, float], memory: dict[str, float]) -> KernelCase:
    def prepare(seed: int) -> dict[str, Run]:
        hidden, weight, targets = made(T, C, V, seed)
        slopes = torch.randn(T, V, device=DEVICE, dtype=torch.bfloat16)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]

        def both(f: Loss) -> Any:
            return torch.autograd.grad(f(*leaves, targets), leaves)

        functions: dict[str, Loss] = {"bigtrain": linear_cross_entropy}
        for tokens in (1024, 4096):  # how many the budget should allow
            budget = tokens * V * 2
            functions[f"bigtrain-{tokens}"] = partial(linear_cross_entropy, budget=budget)
        functions |= peers()
        runs: dict[str, Run] = {name: partial(both, f) for name, f in functions.items()}
        return runs | {"three-products": partial(products, hidden.detach(), weight.detach(), slopes)}

    def check(seed: int) -> float:
        hidden, weight, targets = made(150, 64, 333, seed)
        targets[::7] = -100
        options: Any = {"z_loss": 1e-3, "label_smoothing": 0.1}

        def definition(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return reference.cross_entropy(hidden @ weight.t(), targets, **options).sum()

        def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = linear_cross_entropy(
                hidden, weight, targets, reduction="sum", budget=1, **options
            )
            return found

        return excess(ours, definition, [hidden, weight])

    return KernelCase(
        f"linear cross-entropy T{T} C{C} V{V}", 6 * T * C * V, "TFLOP/s", prepare, check, aims, memory
    )


CASES = [
    loss(8192, 4096, 128256, {"liger": 1.3, "three-products": 0.88}, {"torch": 0.25}),
    loss(8192, 4096, 32000, {"liger": 1.05}, {}),
]
