"""The vocabulary cut over the tensor axis: embedding rows, and a loss that never gathers logits.

Shapes: n tensor ranks, T tokens, B x S of them in a batch, C model width, V vocabulary, v this rank's part of it,
N tokens in a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.config import LossConfig
from bigtrain.logical import logical_of
from bigtrain.model.batch import IGNORE
from bigtrain.model.kernels import in_triton
from bigtrain.model.loss import CHUNK_CPU, CHUNK_GPU, CHUNK_TOKENS, Head, LossSum, scaled, triton_loss
from bigtrain.parallel.collectives import Pending, begin_gather
from bigtrain.parallel.region import Enter, Leave, Region


class VocabularyEmbedding(nn.Module):
    """This rank's rows of the embedding; tokens of other ranks' rows come from them."""

    def __init__(self, embedding: nn.Embedding, region: Region) -> None:
        """`embedding` holds this rank's rows, which its logical record places in the vocabulary."""
        super().__init__()
        self.region = region
        self.weight = embedding.weight
        record = logical_of(embedding.weight)  # type: ignore[arg-type]
        self.start, self.rows = record.offset[0], record.sizes[0]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, S) int64 -> (B, S, C), or (T/n, C) with sequence parallelism."""
        local = tokens - self.start
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        found = found.masked_fill(elsewhere[..., None], 0.0)
        apply: Any = Leave.apply
        x: torch.Tensor = apply(found, self.region)
        return x


class SharedPositions(nn.Module):
    """Learned positions with sequence parallelism: each rank looks up those of its tokens."""

    def __init__(self, embedding: nn.Embedding, region: Region) -> None:
        super().__init__()
        self.region = region
        self.weight = embedding.weight

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """(B, S) int64 -> (T/n, C)."""
        axis = self.region.axis
        return F.embedding(positions.flatten().chunk(axis.size)[axis.rank], self.weight)


class VocabularyHead(nn.Module):
    """The output projection cut by vocabulary, fused with the loss."""

    def __init__(self, head: Head, vocab: int, region: Region) -> None:
        """`head` holds this rank's rows of the weight, of `vocab` in all."""
        super().__init__()
        self.region = region
        self.weight = head.weight
        record = logical_of(head.weight)  # type: ignore[arg-type]
        self.part = Part(record.offset[0], record.sizes[0], vocab)
        self.loss, self.kernels = head.loss, head.kernels

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> LossSum:
        """hidden (B, S, C) or (T/n, C), targets (B, S) -> the summed loss, the same on all tensor ranks."""
        assert targets is not None, "logits are never gathered: give targets, or export the model"
        enter: Any = Enter.apply
        loss: Any = _VocabularyLoss.apply
        hidden = enter(hidden, self.region).flatten(0, -2)
        if in_triton(self.kernels, hidden):
            # Entering sums the ranks' gradients of hidden on the way back, so the loss must not.
            split: Any = {
                "group": self.region.axis.group,
                "first": self.part.start,
                "vocabulary": self.part.vocab,
            }
            return triton_loss(hidden, self.weight, targets.flatten(), self.loss, sum_hidden=False, **split)
        return LossSum(*loss(hidden, self.weight, targets.flatten(), self.loss, self.part, self.region))


class Part(NamedTuple):
    """Rows [start, start + rows) of a vocabulary of `vocab`."""

    start: int
    rows: int
    vocab: int


class _VocabularyLoss(torch.autograd.Function):
    """As model.loss's chunked loss: gradients are made in the forward pass, chunk by chunk.

    Each chunk exchanges four numbers a token: the largest logit, the sum of exponentials, the target's logit and
    the sum of logits. While they travel, the next chunk's logits are computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        loss: LossConfig,
        part: Part,
        region: Region,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        wanted = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wanted else None
        sums = hidden.new_zeros(2, dtype=exact)
        # Every rank cuts by the vocabulary's average part, so that all exchange equally often.
        average = part.vocab // region.axis.size
        chunk = max(CHUNK_TOKENS, (CHUNK_GPU if hidden.is_cuda else CHUNK_CPU) // average)
        ahead: _Chunk | None = None
        for start in [*range(0, hidden.shape[0], chunk), None]:
            this, ahead = ahead, None
            if start is not None:
                h = hidden[start : start + chunk]
                ahead = _Chunk(start, F.linear(h, weight), targets[start : start + chunk], part, region)
            if this is None:
                continue
            some, grad = this.finish(loss, wanted)
            sums += some
            if grad_hidden is not None and grad_weight is not None and grad is not None:
                rows = slice(this.start, this.start + grad.shape[0])
                grad_h = grad.to(hidden.dtype)
                torch.mm(grad_h, weight, out=grad_hidden[rows])
                if grad_h.dtype == exact:
                    torch.addmm(grad_weight, grad_h.t(), hidden[rows], out=grad_weight)
                else:
                    grad_weight += grad_h.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        objective, nll = sums.unbind()
        ctx.mark_non_differentiable(nll)
        return objective, nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return (
            scaled(hidden, grads[0], hidden.dtype),
            scaled(weight, grads[0], ctx.dtype),
            None,
            None,
            None,
            None,
        )


class _Chunk:
    """Logits (N, v) of some tokens, whose statistics are on their way to the other ranks."""

    def __init__(
        self, start: int, logits: torch.Tensor, targets: torch.Tensor, part: Part, region: Region
    ) -> None:
        self.start, self.part, self.region = start, part, region
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.counted = targets != IGNORE
        local = targets - part.start
        self.here = self.counted & (local >= 0) & (local < part.rows)
        self.target = local.where(self.here, 0)[:, None]
        largest = self.logits.amax(-1)
        total = (self.logits - largest[:, None]).exp_().sum(-1)
        wanted = self.logits.gather(1, self.target).squeeze(1).where(self.here, 0.0)
        stats = torch.stack([largest, total, wanted, self.logits.sum(-1)])
        self.under_way: Pending = begin_gather(stats[None], region.axis)

    def finish(self, loss: LossConfig, wanted: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(sum of objectives, sum of plain cross-entropies), and d objective / d logits (N, v)."""
        largest, total, of_target, of_all = self.under_way.wait().unbind(1)  # each (n, N)
        top = largest.amax(0)
        log_z = top + (total * (largest - top).exp()).sum(0).log()
        nll = log_z - of_target.sum(0)
        eps, V = loss.label_smoothing, self.part.vocab
        objective = nll
        if eps or loss.z_loss:
            smooth = log_z - of_all.sum(0) / V
            objective = (1 - eps) * nll + eps * smooth + loss.z_loss * log_z.square()
        sums = torch.stack([(objective * self.counted).sum(), (nll * self.counted).sum()])
        if not wanted:
            return sums, None
        grad = self.logits.sub_(log_z[:, None]).exp_()
        if eps or loss.z_loss:
            grad *= (1 + 2 * loss.z_loss * log_z)[:, None]
            grad -= eps / V
        grad.scatter_add_(1, self.target, torch.where(self.here, eps - 1.0, 0.0).to(grad.dtype)[:, None])
        grad *= self.counted[:, None]
        return sums, grad
