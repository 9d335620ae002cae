"""Cross-entropy, and linear layer + cross-entropy without ever holding all the logits.

The gradient is computed in the forward pass, a chunk of tokens at a time, while the chunk's logits are there: three
matrix products as in plain autograd, and one kernel that overwrites logits by their gradient. What stays until the
backward pass is the gradient of the hidden states (T, C) and of the weight (V, C), in fp32 (Wijmans et al. 2024,
arXiv:2411.09009, and Liger kernel chunk too; chunks of 64 to 512 tokens starve the matrix products, so the budget here
is in bytes). No step waits for the device.

With a process group the vocabulary is split: every rank has rows of the weight, beginning at its `first`, and the
ranks exchange four numbers a token. The exchange of a chunk runs while the logits of the next are computed.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from bigtrain_kernels import cross_entropy_kernels as kernels
from bigtrain_kernels.checks import INTERPRETED, check, is_float, runs_here

Reduction = Literal["none", "mean", "sum"]
BUDGET = 1 << 28
"""Bytes of a chunk's logits. At a vocabulary of 128k in bf16 that is 1,024 tokens, enough to fill the matrix units."""
_FEWEST = 128
"""Tokens of the smallest chunk."""
_BLOCK = 64 if INTERPRETED else 4096


class Options(NamedTuple):
    """What a token's loss is."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


class Sums(NamedTuple):
    """Of the rows of a chunk, fp32: see cross_entropy_kernels.row_sums. `lse`: log-sum-exp over the vocabulary."""

    lse: torch.Tensor
    picked: torch.Tensor
    mean: torch.Tensor


def _sums(logits: torch.Tensor, targets: torch.Tensor, first: int, softcap: float) -> list[torch.Tensor]:
    """PEAK, TOTAL, PICKED and SUM of this rank's part."""
    found = [torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(4)]
    if len(logits):
        kernels.row_sums[(len(logits),)](
            logits, targets, *found, logits.stride(0), logits.shape[1], first, softcap,
            BLOCK=_BLOCK, CAP=softcap > 0, num_warps=8,
        )  # fmt: skip
    return found


def _whole(found: torch.Tensor, vocabulary: int) -> Sums:
    """The sums over the whole vocabulary, of every part's (parts x 4, T)."""
    peaks, totals, picked, plain = found.unflatten(0, (-1, 4)).unbind(1)
    peak = peaks.amax(0)
    base = peak.masked_fill(peak == -torch.inf, 0)
    lse = base + (totals * torch.exp(peaks - base)).sum(0).log()
    return Sums(lse, picked.sum(0), plain.sum(0) / vocabulary)


def _losses(sums: Sums, counted: torch.Tensor, options: Options) -> torch.Tensor:
    """Loss by token; 0 where nothing counts."""
    eps = options.label_smoothing
    loss = (1 - eps) * (sums.lse - sums.picked) + eps * (sums.lse - sums.mean)
    return (loss + options.z_loss * sums.lse.square()).masked_fill(~counted, 0)


def _to_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    sums: Sums,
    weight: torch.Tensor,
    first: int,
    vocabulary: int,
    options: Options,
) -> None:
    if len(logits):
        kernels.gradient[(len(logits),)](
            logits, targets, sums.lse, weight, logits.stride(0), logits.shape[1], first, vocabulary,
            options.softcap, options.label_smoothing, options.z_loss,
            BLOCK=_BLOCK, CAP=options.softcap > 0, num_warps=8,
        )  # fmt: skip


class _Chunk(NamedTuple):
    """A chunk whose logits are there, and whose exchange with the other ranks is under way."""

    rows: slice
    logits: torch.Tensor
    mine: torch.Tensor
    parts: torch.Tensor
    exchange: Any


@torch.library.custom_op("bigtrain::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weight: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first: int,
    vocabulary: int,
    group: str,
    budget: int,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss by token (T,), and the gradients of sum(token_weight x loss): hidden (T, C) and weight (V, C), fp32."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    T, V = len(hidden), len(weight)
    loss = torch.zeros(T, dtype=torch.float32, device=hidden.device)
    dh, dw = (
        torch.zeros(x.shape if gradients else (0,), dtype=torch.float32, device=x.device)
        for x in (hidden, weight)
    )
    step = max(_FEWEST, budget // max(1, V * hidden.element_size()))
    ranks = _ranks(group)

    def begin(start: int) -> _Chunk:
        rows = slice(start, min(start + step, T))
        logits = hidden[rows] @ weight.t()
        mine = torch.stack(_sums(logits, targets[rows], first, softcap))
        if ranks is None:
            return _Chunk(rows, logits, mine, mine, None)
        parts = mine.new_empty(dist.get_world_size(ranks) * len(mine), mine.shape[1])
        return _Chunk(
            rows, logits, mine, parts, dist.all_gather_into_tensor(parts, mine, ranks, async_op=True)
        )

    def end(chunk: _Chunk) -> None:
        if chunk.exchange is not None:
            chunk.exchange.wait()
        rows = chunk.rows
        sums = _whole(chunk.parts, vocabulary)
        counted = targets[rows] != ignore_index
        loss[rows] = _losses(sums, counted, options)
        if not gradients:
            return
        _to_gradient(
            chunk.logits,
            targets[rows],
            sums,
            token_weight[rows].where(counted, 0.0),
            first,
            vocabulary,
            options,
        )
        dh[rows] = (chunk.logits @ weight).float()
        if hidden.dtype == torch.float32:
            dw.addmm_(chunk.logits.t(), hidden[rows])
        else:  # a chunk's product in 16 bits, the sum of chunks in fp32
            dw.add_(chunk.logits.t() @ hidden[rows])

    waiting: _Chunk | None = None
    for start in range(0, T, step):
        chunk = begin(start)
        if waiting is not None:
            end(waiting)
        waiting = chunk
    if waiting is not None:
        end(waiting)
    if gradients and ranks is not None:
        dist.all_reduce(dh, group=ranks)
    return loss, dh, dw


@_linear_cross_entropy.register_fake
def _(hidden: Any, weight: Any, targets: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = rest[-1]
    fp32 = {"dtype": torch.float32}
    loss = hidden.new_empty(len(hidden), **fp32)
    if not gradients:
        return loss, hidden.new_empty(0, **fp32), hidden.new_empty(0, **fp32)
    return loss, hidden.new_empty(hidden.shape, **fp32), weight.new_empty(weight.shape, **fp32)


class _Loss(torch.autograd.Function):
    """The sum of weighted token losses, whose gradient is known when it is; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, targets: Any, token_weight: Any, *rest: Any
    ) -> torch.Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        op: Any = _linear_cross_entropy
        loss, dh, dw = op(hidden, weight, targets, token_weight, *rest, wanted)
        ctx.save_for_backward(dh, dw)
        ctx.dtypes = hidden.dtype, weight.dtype
        total: torch.Tensor = (loss * token_weight).sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        dh, dw = ctx.saved_tensors
        return (dh * grads[0]).to(ctx.dtypes[0]), (dw * grads[0]).to(ctx.dtypes[1]), *[None] * 10


class _TokenLosses(torch.autograd.Function):
    """The losses by token: the gradient by each is not known before backward, which computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, targets: Any, token_weight: Any, *rest: Any
    ) -> torch.Tensor:
        op: Any = _linear_cross_entropy
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rest = rest
        loss: torch.Tensor = op(hidden, weight, targets, token_weight, *rest, False)[0]
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, targets = ctx.saved_tensors
        op: Any = _linear_cross_entropy
        _, dh, dw = op(hidden, weight, targets, grads[0].contiguous(), *ctx.rest, True)
        return dh.to(hidden.dtype), dw.to(weight.dtype), *[None] * 10


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | None = None,
    first: int = 0,
    vocabulary: int | None = None,
    budget: int = BUDGET,
) -> torch.Tensor:
    """Cross-entropy of hidden (T, C) @ weight (V, C)^T against targets (T,) int64, in fp32; hidden may be 16-bit.

    A token whose target is `ignore_index` does not count: its loss and gradients are 0, and "mean" is over the others
    (NaN if there are none, as torch's). `z_loss` z adds z x log-sum-exp^2; `softcap` c > 0 makes a logit
    c tanh(logit / c). With "none" the losses by token (T,); then backward computes the logits a second time.

    `group`: the vocabulary is split over its ranks; `weight` are the rows from `first` on of `vocabulary` rows, hidden
    and targets are the same on all ranks, and every rank gets the same loss and the whole gradient of hidden.
    `budget`: bytes of logits at a time.

    Raises ValueError naming the argument. On a GPU the targets are not looked at, for that would wait for it: a target
    outside the vocabulary reads nothing and gives the loss of a token whose logit is 0.
    """
    vocabulary = len(weight) if vocabulary is None else vocabulary
    _check(hidden, weight, targets, ignore_index, first, vocabulary)
    check(0 <= label_smoothing < 1, "label_smoothing", f"is {label_smoothing}, expected [0, 1)")
    check(z_loss >= 0, "z_loss", f"is {z_loss}, expected 0 or more")
    check(softcap >= 0, "softcap", f"is {softcap}, expected 0 or more")
    check(
        reduction in ("none", "mean", "sum"),
        "reduction",
        f'is {reduction!r}, expected "none", "mean" or "sum"',
    )
    check(budget > 0, "budget", f"is {budget} bytes")
    rest = (ignore_index, label_smoothing, z_loss, softcap, first, vocabulary, _name(group), budget)
    ones = torch.ones(len(hidden), dtype=torch.float32, device=hidden.device)
    parts = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    if reduction == "none":
        losses: Any = _TokenLosses.apply
        return losses(*parts, ones, *rest)  # type: ignore[no-any-return]
    if reduction == "mean":
        ones = ones / (targets != ignore_index).sum()
    total: Any = _Loss.apply
    return total(*parts, ones, *rest)  # type: ignore[no-any-return]


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore: int,
    first: int,
    vocabulary: int,
) -> None:
    check(hidden.ndim == 2, "hidden", f"has {hidden.ndim} dimensions, expected (T, C)")
    check(weight.ndim == 2, "weight", f"has {weight.ndim} dimensions, expected (V, C)")
    is_float(hidden, "hidden")
    check(weight.dtype == hidden.dtype, "weight", f"is {weight.dtype}, hidden is {hidden.dtype}")
    check(
        weight.shape[1] == hidden.shape[1],
        "weight",
        f"has width {weight.shape[1]}, hidden has {hidden.shape[1]}",
    )
    check(
        targets.shape == hidden.shape[:1],
        "targets",
        f"has shape {tuple(targets.shape)}, expected ({len(hidden)},)",
    )
    check(targets.dtype == torch.int64, "targets", f"is {targets.dtype}, expected int64")
    for name, x in (("weight", weight), ("targets", targets)):
        check(x.device == hidden.device, name, f"is on {x.device}, hidden is on {hidden.device}")
    check(
        first >= 0 and first + len(weight) <= vocabulary,
        "first",
        f"is {first}: {len(weight)} rows from there on do not lie in a vocabulary of {vocabulary}",
    )
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and type(targets) is torch.Tensor:
        wrong = targets[(targets != ignore) & ((targets < 0) | (targets >= vocabulary))]
        check(
            len(wrong) == 0, "targets", f"hold {wrong.tolist()[:5]}, outside the vocabulary of {vocabulary}"
        )
    runs_here(hidden)


def _name(group: dist.ProcessGroup | None) -> str:
    """Ops take strings; torch finds a group by its name."""
    return "" if group is None else str(group.group_name)


def _ranks(name: str) -> dist.ProcessGroup | None:
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]
