"""The tensor-parallel region of a layer: how hidden states enter it, leave it, and how gradients come back.

Outside the region every tensor rank holds all tokens (B, S, C), or with sequence parallelism its share of the
flattened tokens (T/n, C): norms, residuals and biases work token by token, so any share will do, and a contiguous
one gathers without a copy (Korthikanti et al. 2022, arXiv 2205.05198, cut the sequence instead). Inside the region
every rank has all T tokens and a part of the features.

Entering is free or an all-gather, leaving an all-reduce or a reduce-scatter, and backward the other way round.
Shapes: n tensor ranks, B batch, S sequence, T = B x S tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bigtrain.mesh import Axis
from bigtrain.parallel.collectives import Pending, begin_gather, begin_scatter_sum, begin_sum

Job = tuple[list[torch.nn.Parameter], Callable[[], list[torch.Tensor]]]


class Later:
    """Weight gradients put off: a zero-bubble schedule computes them where the pipeline would idle."""

    def __init__(self) -> None:
        self._jobs: list[Job] | None = None

    @property
    def collecting(self) -> bool:
        """Whether backward passes hand their weight gradients over instead of computing them."""
        return self._jobs is not None

    def start(self) -> None:
        """From now on, collect."""
        self._jobs = []

    def add(self, parameters: list[torch.nn.Parameter], compute: Callable[[], list[torch.Tensor]]) -> None:
        """Put off the gradients of `parameters`, which `compute` returns."""
        assert self._jobs is not None
        self._jobs.append((parameters, compute))

    def take(self) -> list[Job]:
        """Stop collecting; what was collected."""
        jobs, self._jobs = self._jobs or [], None
        return jobs


def run_jobs(jobs: list[Job]) -> None:
    """Compute gradients that were put off and add them to their parameters, hooks included."""
    for parameters, compute in jobs:
        torch.autograd.backward(parameters, compute())


@dataclass(frozen=True)
class Region:
    """The tensor axis as layers see it."""

    axis: Axis
    sequence: bool
    """Outside the region each rank holds its share of the tokens (sequence parallelism)."""
    later: Later = field(default_factory=Later)

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens: (T/n, C) -> (T, C), or x itself."""
        return begin_gather(x, self.axis).wait() if self.sequence else x

    def begin_enter_grad(self, grad: torch.Tensor) -> Pending:
        """Sum the gradient of what entered, which each rank knows a part of."""
        return begin_scatter_sum(grad, self.axis) if self.sequence else begin_sum(grad, self.axis)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Sum the ranks' parts (..., C): (T/n, C) with sequence parallelism, else the shape of x.

        Overwrites x.
        """
        if self.sequence:
            return begin_scatter_sum(x.flatten(0, -2), self.axis).wait()
        return begin_sum(x, self.axis).wait()

    def leave_grad(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of every token, which each rank's part has in full."""
        return begin_gather(grad, self.axis).wait() if self.sequence else grad


class Enter(torch.autograd.Function):
    """Hidden states enter the region."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, region: Region) -> torch.Tensor:
        """See `Region.enter`."""
        ctx.region, ctx.shape = region, x.shape
        entered = region.enter(x)
        return entered.view_as(entered) if entered is x else entered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """See `Region.begin_enter_grad`."""
        return ctx.region.begin_enter_grad(grads[0].clone()).wait().view(ctx.shape), None


class Leave(torch.autograd.Function):
    """The ranks' parts leave the region as their sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, region: Region) -> torch.Tensor:
        """See `Region.leave`."""
        ctx.region, ctx.shape = region, x.shape
        return region.leave(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """See `Region.leave_grad`."""
        return ctx.region.leave_grad(grads[0]).view(ctx.shape), None
