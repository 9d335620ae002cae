"""From hidden states to one summed loss, without ever holding all the logits.

At V = 128k and T = 8k the fp32 logits and their gradient are 8.4 GB; here they exist a chunk of tokens at a
time. Shapes: T tokens, C model width, V vocab, N tokens in a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.config import LossConfig
from bigtrain.model.batch import IGNORE
from bigtrain.model.kernels import in_triton

CHUNK_CPU = 1 << 20
"""Logits in one chunk on a CPU: 4 MB of fp32, so that the passes over them stay in cache."""
CHUNK_TOKENS = 128
"""Tokens in the smallest chunk: fewer would starve the matrix products."""
CHUNK_GPU = 1 << 26
"""On a GPU: 256 MB of fp32, large enough to keep the matrix units busy."""


class LossSum(NamedTuple):
    """Sums over the counted tokens of one microbatch (never means: design D5)."""

    objective: torch.Tensor
    """Scalar fp32 with gradient: cross-entropy (smoothed) + z-loss."""
    nll: torch.Tensor
    """Scalar fp32, detached: the plain cross-entropy in nats, which is what gets reported."""


class Head(nn.Linear):
    """The output projection (V, C); fused with the loss when it is given targets."""

    def __init__(self, width: int, vocab: int, loss: LossConfig, *, kernels: str, bias: bool = False) -> None:
        super().__init__(width, vocab, bias=bias)
        self.loss = loss
        self.kernels = kernels

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, targets: torch.Tensor | None = None
    ) -> torch.Tensor | LossSum:
        """hidden (B, S, C) -> logits (B, S, V) in hidden's dtype; with targets (B, S) the summed loss."""
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if self.kernels == "reference":
            return reference_loss(F.linear(hidden, self.weight, self.bias), targets, self.loss)
        if in_triton(self.kernels, hidden):
            return triton_loss(hidden, self.weight, targets, self.loss, bias=self.bias)
        apply: Any = _ChunkedLoss.apply
        return LossSum(*apply(hidden, self.weight, self.bias, targets, self.loss))


def reference_loss(logits: torch.Tensor, targets: torch.Tensor, loss: LossConfig) -> LossSum:
    """The definition, on whole logits (T, V) and targets (T,); IGNORE where nothing is counted."""
    logits = _at_least_fp32(logits)
    counted = targets != IGNORE
    log_z = logits.logsumexp(-1)
    target_logit = logits.gather(1, targets.where(counted, 0)[:, None]).squeeze(1)
    nll = log_z - target_logit
    smooth = log_z - logits.mean(-1)  # cross-entropy against the uniform distribution
    objective = (
        (1 - loss.label_smoothing) * nll + loss.label_smoothing * smooth + loss.z_loss * log_z.square()
    )
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    return LossSum(objective.where(counted, zero).sum(), nll.detach().where(counted, zero).sum())


def triton_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, loss: LossConfig, **more: Any
) -> LossSum:
    """The same in our Triton kernels: hidden (T, C), weight (V, C). `more`: as linear_cross_entropy takes it."""
    from bigtrain_kernels.linear_cross_entropy import linear_cross_entropy  # loads triton

    return LossSum(
        *linear_cross_entropy(
            hidden, weight, targets, ignore_index=IGNORE, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss,
            reduction="sum", return_nll=True, **more,
        )
    )  # fmt: skip


class _ChunkedLoss(torch.autograd.Function):
    """The gradient is computed in the forward pass, chunk by chunk, while the logits are there.

    Costs the same three matrix products as plain autograd and keeps grad_hidden (T, C) and grad_weight (V, C)
    instead of T x V numbers (the idea of Liger kernel and of Wijmans et al. 2024, arXiv 2411.09009).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        loss: LossConfig,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        V, exact = weight.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        chunk = max(CHUNK_TOKENS, (CHUNK_GPU if hidden.is_cuda else CHUNK_CPU) // V)
        wanted = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wanted else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if wanted and bias is not None else None
        objective, nll = hidden.new_zeros((), dtype=exact), hidden.new_zeros((), dtype=exact)
        for start in range(0, hidden.shape[0], chunk):
            h, t = hidden[start : start + chunk], targets[start : start + chunk]
            some_objective, some_nll, grad = _chunk(F.linear(h, weight, bias), t, loss, wanted)
            objective += some_objective
            nll += some_nll
            if grad_hidden is not None and grad_weight is not None:
                grad_h = grad.to(hidden.dtype)
                torch.mm(grad_h, weight, out=grad_hidden[start : start + chunk])
                if grad_h.dtype == exact:
                    torch.addmm(grad_weight, grad_h.t(), h, out=grad_weight)
                else:
                    grad_weight += grad_h.t() @ h
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return objective, nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        return (
            scaled(hidden, grads[0], hidden.dtype),
            scaled(weight, grads[0], ctx.dtype),
            None if bias is None else scaled(bias, grads[0], ctx.dtype),
            None,
            None,
        )


def scaled(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x times a scalar, rounded once; without the product in x's dtype, which of a head of 128k x 4096 is 2 GiB."""
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


def _chunk(
    logits: torch.Tensor, targets: torch.Tensor, loss: LossConfig, wanted: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Objective, plain cross-entropy and d objective / d logits (N, V) of one chunk of logits (N, V)."""
    logits = _at_least_fp32(logits)
    V, eps = logits.shape[1], loss.label_smoothing
    counted = (targets != IGNORE)[:, None]
    target = targets[:, None].where(counted, 0)
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, target)
    objective = nll
    log_z = None
    if loss.z_loss or eps:
        log_z = logits.gather(1, target) + nll
        objective = (
            (1 - eps) * nll + eps * (log_z - logits.mean(-1, keepdim=True)) + loss.z_loss * log_z.square()
        )
    sums = (objective * counted).sum(), (nll * counted).sum()
    if not wanted:
        return *sums, log_p
    grad = log_p.exp_()
    if log_z is not None:
        grad *= 1 + 2 * loss.z_loss * log_z
        grad -= eps / V
    grad.scatter_add_(1, target, torch.full_like(nll, eps - 1))
    grad *= counted
    return *sums, grad


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """16-bit to fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
