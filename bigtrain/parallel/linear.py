"""Linear layers of a tensor-parallel region: column-parallel ones share one entrance, row-parallel ones leave.

Shapes: n tensor ranks, T tokens, C model width, K input and N output features of this rank's part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.parallel.region import Region


class ColumnLinears(nn.Module):
    """Several projections of one input, each cut by output features: queries, keys and values; gate and up.

    One module, so that the input enters once, its gradient is summed once, and that sum travels while the weight
    gradients are computed.
    """

    def __init__(self, linears: list[nn.Linear], region: Region) -> None:
        """`linears` hold this rank's rows; their parameters become this module's own (ZeRO-3 gathers the
        parameters of the module that runs)."""
        super().__init__()
        self.region = region
        self.count = len(linears)
        for i, linear in enumerate(linears):
            self.register_parameter(f"weight_{i}", linear.weight)  # type: ignore[arg-type]
            self.register_parameter(f"bias_{i}", linear.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, S, C), or (T/n, C) with sequence parallelism -> one (..., N) for each projection, all tokens."""
        weights = [getattr(self, f"weight_{i}") for i in range(self.count)]
        biases = [getattr(self, f"bias_{i}") for i in range(self.count)]
        apply: Any = _ColumnLinears.apply
        outputs: tuple[torch.Tensor, ...] = apply(x, self.region, *weights, *biases)
        return outputs


class _ColumnLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, region: Region, *parameters: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        half = len(parameters) // 2
        # Not save_for_backward: recomputation would give copies back, and gradients that are put off need the
        # parameters themselves.
        ctx.weights, ctx.biases = parameters[:half], parameters[half:]
        entered = region.enter(x)
        ctx.region, ctx.shape = region, x.shape
        ctx.save_for_backward(entered)
        return tuple(F.linear(entered, w, b) for w, b in zip(ctx.weights, ctx.biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (entered,) = ctx.saved_tensors
        region: Region = ctx.region
        weights = list(ctx.weights)
        flat = [g.flatten(0, -2) for g in grads]
        grad_x = flat[0] @ weights[0]
        for g, w in zip(flat[1:], weights[1:], strict=True):
            grad_x.addmm_(g, w)
        under_way = region.begin_enter_grad(grad_x)
        found = weight_gradients(region, entered, weights, ctx.biases, flat)
        return under_way.wait().view(ctx.shape), None, *found


class RowLinear(nn.Module):
    """A projection cut by input features; the ranks' outputs are summed on leaving the region."""

    def __init__(self, linear: nn.Linear, region: Region) -> None:
        """`linear` holds this rank's columns of the weight and the whole bias."""
        super().__init__()
        self.region = region
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) of all tokens -> (..., C), or (T/n, C) with sequence parallelism."""
        apply: Any = _RowLinear.apply
        out: torch.Tensor = apply(x, self.weight, self.region)
        return out if self.bias is None else out + self.bias


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, region: Region) -> torch.Tensor:
        ctx.region, ctx.weight = region, weight
        ctx.save_for_backward(x)
        return region.leave(F.linear(x, weight))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        grad = ctx.region.leave_grad(grads[0]).flatten(0, -2)
        (grad_weight, _) = weight_gradients(ctx.region, x, [weight], [None], [grad])
        return (grad @ weight).view(x.shape), grad_weight, None


def weight_gradients(
    region: Region,
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    grads: list[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Gradients of the weights, then of the biases; all None when they are put off until later.

    x (..., K), each of `grads` (T, N).
    """
    x = x.detach()  # what waits must not keep the graph, which ends in the chunk's input and its gradient

    def compute() -> list[torch.Tensor]:
        rows = x.flatten(0, -2)
        of_weights = [g.t() @ rows for g in grads]
        return of_weights + [g.sum(0) for g, b in zip(grads, biases, strict=True) if b is not None]

    if region.later.collecting:
        region.later.add([p for p in (*weights, *biases) if p is not None], compute)  # type: ignore[misc]
        return [None] * (len(weights) + len(biases))
    found = compute()
    of_biases = iter(found[len(weights) :])
    return found[: len(weights)] + [None if b is None else next(of_biases) for b in biases]
