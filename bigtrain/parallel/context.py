"""Context parallelism: each sequence is shared by the ranks of the context axis, and attention is brought together.

gather: a rank keeps its queries and gathers everybody's keys and values (Llama 3, arXiv 2407.21783, section 3.3.2),
which are small with grouped heads. Under a causal mask late queries see more keys than early ones, so the sequence
is cut into 2 n pieces and rank r computes pieces r and 2 n - 1 - r: equal work for all. ulysses: heads are exchanged
for tokens before attention and back after it (Jacobs et al. 2023, arXiv 2309.14509). Shapes: n context ranks, B
batch, S sequence, Q = S / n of this rank, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from bigtrain.mesh import Axis, Mesh
from bigtrain.model.attention import Attend, Scope
from bigtrain.model.batch import Batch
from bigtrain.model.loss import LossSum
from bigtrain.model.transformer import Transformer
from bigtrain.parallel.collectives import begin_gather, begin_scatter_sum, exchange
from bigtrain.parallel.tensor import attentions


def columns_of(rank: int, size: int, S: int, *, by: str) -> torch.Tensor:
    """The columns (Q,) int64 of a sequence that context rank `rank` of `size` computes."""
    if by == "ulysses" or size == 1:
        return torch.arange(rank * S // size, (rank + 1) * S // size)
    piece = S // (2 * size)
    late = 2 * size - 1 - rank
    return torch.cat(
        [torch.arange(rank * piece, (rank + 1) * piece), torch.arange(late * piece, (late + 1) * piece)]
    )


class SharedSequence(nn.Module):
    """A transformer that computes this rank's columns of each sequence."""

    def __init__(self, model: Transformer, mesh: Mesh, *, by: str, sequence: bool) -> None:
        """`by` is how attention is brought together; `sequence`: hidden states are (T/n, C) outside layers."""
        super().__init__()
        self.model = model
        self.axis = mesh.context
        self.by = by
        self.sequence = sequence
        self.tensor_ranks = mesh.tensor.size

    def columns(self, S: int, device: torch.device) -> torch.Tensor:
        """This rank's columns of sequences of S tokens."""
        return columns_of(self.axis.rank, self.axis.size, S, by=self.by).to(device)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor | LossSum:
        """As `Transformer.forward` with whole tokens and targets (B, S); the loss is summed over this rank's Q."""
        scope = self._scope(tokens, cu_seqlens)
        if self.axis.size > 1:
            columns = self.columns(tokens.shape[1], tokens.device)
            tokens = tokens[:, columns]
            targets = None if targets is None else targets[:, columns]
        if self.sequence:
            scope = replace(scope, positions=scope.positions.expand(scope.rows))
        return self.model(tokens, targets=targets, scope=scope, hidden=hidden)  # type: ignore[no-any-return]

    def empty_hidden(self, batch: Batch) -> torch.Tensor:
        """Room for the hidden states of a batch, in the shape and dtype that layers exchange."""
        B, S = batch.tokens.shape
        shape: tuple[int, ...] = (B, S // self.axis.size)
        if self.sequence:
            shape = (B * S // self.axis.size // self.tensor_ranks,)
        dtype = next(self.parameters()).dtype
        return torch.empty(*shape, self.model.config.width, dtype=dtype, device=batch.tokens.device)

    def _scope(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Scope:
        whole = partial(self.model.scope, tokens, cu_seqlens)
        if self.axis.size == 1:
            return whole()
        columns = self.columns(tokens.shape[1], tokens.device)
        if self.by == "gather":
            return whole(queries=columns)
        # Attention sees whole sequences, everything else this rank's columns.
        scope = whole()
        rope = scope.rope and (scope.rope[0][..., columns, :, :], scope.rope[1][..., columns, :, :])
        rows = (tokens.shape[0], len(columns))
        return replace(scope, rows=rows, positions=scope.positions[..., columns], rope=rope)


def share_sequences(model: Transformer, mesh: Mesh, *, by: str) -> None:
    """Make every attention of `model` work over the context axis."""
    for attention in attentions(model):
        kind = UlyssesAttention if by == "ulysses" else GatherAttention
        attention.attend = kind(attention.attend, mesh.context)


class GatherAttention:
    """Local queries against everybody's keys and values."""

    def __init__(self, attend: Attend, axis: Axis) -> None:
        self.attend = attend
        self.axis = axis

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scope: Scope) -> torch.Tensor:
        """q (B, Q, H, D), k and v (B, Q, K, D) -> (B, Q, H, D)."""
        gather: Any = _GatherColumns.apply
        k, v = gather(torch.stack([k, v]), self.axis).unbind()
        if not scope.causal:
            return self.attend(q, k, v, scope)
        n, piece = self.axis.size, q.shape[1] // 2
        halves = []
        for half, number in enumerate((self.axis.rank, 2 * n - 1 - self.axis.rank)):
            mine, seen = slice(half * piece, (half + 1) * piece), (number + 1) * piece
            halves.append(self._piece(q[:, mine], k[:, :seen], v[:, :seen], scope, mine))
        return torch.cat(halves, dim=1)

    def _piece(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scope: Scope, mine: slice
    ) -> torch.Tensor:
        """Queries of one piece, which see no key behind the given ones."""
        if scope.mask is not None:
            return self.attend(q, k, v, replace(scope, mask=scope.mask[..., mine, : k.shape[1]]))
        # Flash kernels know a causal mask aligned to the last key; a mask tensor would rule them out.
        bias: Any = causal_lower_right(q.shape[1], k.shape[1])
        return self.attend(q, k, v, replace(scope, mask=bias))


class _GatherColumns(torch.autograd.Function):
    """(2, B, Q, K, D) of each rank -> (2, B, S, K, D) in the order of the sequence."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        n, S = axis.size, axis.size * x.shape[2]
        order = torch.cat([columns_of(rank, n, S, by="gather") for rank in range(n)]).to(x.device)
        ctx.axis, ctx.order = axis, order
        parts = begin_gather(x[None], axis).wait()  # (n, 2, B, Q, K, D)
        whole = parts.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
        return whole.index_select(2, order.argsort())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        parts = grad.index_select(2, ctx.order).unflatten(2, (ctx.axis.size, -1)).permute(2, 0, 1, 3, 4, 5)
        return begin_scatter_sum(parts, ctx.axis).wait()[0], None


class UlyssesAttention:
    """All tokens of a share of the heads."""

    def __init__(self, attend: Attend, axis: Axis) -> None:
        self.attend = attend
        self.axis = axis

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scope: Scope) -> torch.Tensor:
        """q (B, Q, H, D), k and v (B, Q, K, D) -> (B, Q, H, D)."""
        n = self.axis.size
        # Fewer kv heads than ranks: each goes to all ranks whose queries need it.
        repeat = max(1, n // k.shape[2])
        k, v = (x.repeat_interleave(repeat, dim=2) if repeat > 1 else x for x in (k, v))
        shares = [x.shape[2] // n for x in (q, k, v)]
        send: Any = _ToHeads.apply
        # One exchange for all three: row i holds the heads of rank i.
        packed = torch.cat([x.unflatten(2, (n, -1)) for x in (q, k, v)], dim=3)
        q, k, v = send(packed, self.axis).split(shares, dim=2)
        out = self.attend(q, k, v, scope)
        back: Any = _ToTokens.apply
        returned: torch.Tensor = back(out, self.axis)
        return returned


def _to_heads(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """(B, Q, n, h, D) -> (B, S, h, D)."""
    return exchange(x.permute(2, 0, 1, 3, 4), axis).transpose(0, 1).flatten(1, 2)


def _to_tokens(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """(B, S, h, D) -> (B, Q, n h, D): the inverse."""
    rows = x.unflatten(1, (axis.size, -1)).transpose(0, 1)
    return exchange(rows, axis).permute(1, 2, 0, 3, 4).flatten(2, 3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _to_heads(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _to_tokens(grads[0], ctx.axis).unflatten(2, (ctx.axis.size, -1)), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return _to_tokens(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _to_heads(grads[0].unflatten(2, (ctx.axis.size, -1)), ctx.axis), None
