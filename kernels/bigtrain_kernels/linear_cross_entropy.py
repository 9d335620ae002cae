"""Linear layer + cross-entropy without ever holding all the logits.

The gradient is computed in the forward pass, a chunk of tokens at a time, while the chunk's logits are there: three
matrix products as in plain autograd, and one kernel that overwrites logits by their gradient. What stays until the
backward pass is the gradient of the hidden states (T, C) and, in fp32, of the weight (V, C) (Wijmans et al. 2024,
arXiv:2411.09009, and Liger kernel chunk too; chunks of 64 to 512 tokens starve the matrix products, so the budget here
is in bytes). No step waits for the device.

With a process group the vocabulary is split: every rank has rows of the weight, beginning at its `first`, and the
ranks exchange four numbers a token. The exchange of a chunk runs while the logits of the next are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.flop_counter import register_flop_formula

from bigtrain_kernels.checks import check, is_float
from bigtrain_kernels.cross_entropy import (
    Options,
    Reduction,
    check_options,
    check_targets,
    partial_sums,
    token_losses,
    whole_sums,
    write_gradient,
)

BUDGET = 1 << 28
"""Bytes of a chunk's logits. At a vocabulary of 128k in bf16 that is 1,024 tokens, enough to fill the matrix units."""
_FEWEST = 128
"""Tokens of the smallest chunk."""


class _Gradients(NamedTuple):
    """Of hidden, in its dtype, and of weight and bias, fp32 sums over the chunks. Empty where none is wanted."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


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
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    token_weight: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    first: int,
    vocabulary: int,
    group: str,
    sum_hidden: bool,
    budget: int,
    gradients: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and plain cross-entropy by token (T,); gradients of sum(token_weight x loss) by hidden, weight, bias."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    T = len(hidden)
    exact = _exact(hidden)
    loss, nll = torch.zeros(2, T, dtype=exact, device=hidden.device).unbind()
    found = _empty(hidden, weight, bias, gradients)
    found.weight.zero_()
    found.bias.zero_()
    ranks = ranks_of(group)
    size = 1 if ranks is None else dist.get_world_size(ranks)
    step = chunk_tokens(vocabulary, size, hidden.element_size(), budget)

    def begin(start: int) -> _Chunk:
        rows = slice(start, min(start + step, T))
        logits = torch.nn.functional.linear(hidden[rows], weight, bias)
        mine = partial_sums(logits, targets[rows], first, softcap)
        if ranks is None:
            return _Chunk(rows, logits, mine, mine, None)
        parts = mine.new_empty(dist.get_world_size(ranks) * len(mine), mine.shape[1])
        exchange = dist.all_gather_into_tensor(parts, mine, ranks, async_op=True)
        return _Chunk(rows, logits, mine, parts, exchange)

    def end(chunk: _Chunk) -> None:
        if chunk.exchange is not None:
            chunk.exchange.wait()
        rows = chunk.rows
        sums = whole_sums(chunk.parts, vocabulary)
        counted = targets[rows] != ignore_index
        loss[rows], nll[rows] = token_losses(sums, counted, options)
        if gradients:
            scale = token_weight[rows].where(counted, 0.0)
            slopes = chunk.logits
            write_gradient(
                slopes, slopes, targets[rows], sums.lse, scale, options, first=first, vocabulary=vocabulary
            )
            _add(found, slopes, hidden[rows], weight, rows)

    # With an exchange the next chunk's logits are computed while it travels; else one chunk's are held at a time.
    waiting: list[_Chunk] = []
    for start in range(0, T, step):
        waiting.append(begin(start))
        if ranks is None or len(waiting) > 1:
            end(waiting.pop(0))
    for chunk in waiting:
        end(chunk)
    if gradients and ranks is not None and sum_hidden:
        dist.all_reduce(found.hidden, group=ranks)
    return loss, nll.clone(), *found


def chunk_tokens(vocabulary: int, ranks: int, element_size: int, budget: int = BUDGET) -> int:
    """Tokens whose logits are there at a time. By the average part of the vocabulary, so that all ranks cut alike."""
    average = -(-vocabulary // ranks)
    return max(_FEWEST, budget // max(1, average * element_size))


def _add(
    found: _Gradients, slopes: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, rows: slice
) -> None:
    """What the gradient of a chunk's logits (N, V) adds to the others."""
    torch.mm(slopes, weight, out=found.hidden[rows])
    if slopes.dtype == found.weight.dtype:
        found.weight.addmm_(slopes.t(), hidden)
    else:  # a chunk's product in 16 bits, the sum of chunks in fp32
        found.weight.add_(slopes.t() @ hidden)
    if found.bias.numel():
        found.bias.add_(slopes.sum(0, dtype=found.bias.dtype))


def _exact(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _empty(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: bool) -> _Gradients:
    def like(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return hidden.new_empty(x.shape if wanted and x is not None else 0, dtype=dtype)

    return _Gradients(like(hidden, hidden.dtype), like(weight, _exact(hidden)), like(bias, _exact(hidden)))


@_linear_cross_entropy.register_fake
def _(hidden: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    loss = hidden.new_empty(hidden.shape[:1], dtype=_exact(hidden))
    return loss, torch.empty_like(loss), *_empty(hidden, weight, bias, rest[-1])


@register_flop_formula(torch.ops.bigtrain.linear_cross_entropy, get_raw=True)
def _flops(hidden: Any, weight: Any, *rest: Any, out_val: Any = None, **more: Any) -> int:
    """2 T C V for each product: the logits, and with gradients the two of the backward pass."""
    products = 3 if rest[-1] else 1
    return int(2 * products * hidden.shape[0] * hidden.shape[1] * weight.shape[0])


class _Loss(torch.autograd.Function):
    """The sum of weighted token losses, whose gradient is known when it is; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, token_weight: Any, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = any(ctx.needs_input_grad[:3])
        op: Any = _linear_cross_entropy
        loss, nll, *found = op(hidden, weight, bias, targets, token_weight, *rest, wanted)
        ctx.save_for_backward(*found)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        total, plain = ((x * token_weight).sum() for x in (loss, nll))
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        found = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if dtype is None else _scaled(x, grads[0], dtype) for x, dtype in found), *[None] * 11


def _scaled(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x times a scalar, rounded once, with no product in fp32 between: of a weight of 128k x 4096 it is 2 GiB."""
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


class _TokenLosses(torch.autograd.Function):
    """The losses by token: the gradient by each is not known before backward, which computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, token_weight: Any, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        op: Any = _linear_cross_entropy
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.rest = rest
        loss, nll, *_ = op(hidden, weight, bias, targets, token_weight, *rest, False)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        op: Any = _linear_cross_entropy
        _, _, dh, dw, db = op(hidden, weight, bias, targets, grads[0].contiguous(), *ctx.rest, True)
        return dh, dw.to(weight.dtype), None if bias is None else db.to(bias.dtype), *[None] * 11


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | None = None,
    first: int = 0,
    vocabulary: int | None = None,
    sum_hidden: bool = True,
    budget: int = BUDGET,
    return_nll: bool = False,
) -> Any:
    """Cross-entropy of hidden (T, C) @ weight (V, C)^T + bias (V,) against targets (T,) int64, in fp32.

    Hidden, weight and bias have one dtype, which may be of 16 bits. A token whose target is `ignore_index` does not
    count: its loss and gradients are 0, and "mean" is over the others (NaN if there are none, as torch's). `z_loss` z
    adds z x log-sum-exp^2; `softcap` c > 0 makes a logit c tanh(logit / c). With "none" the losses by token (T,); then
    backward computes the logits a second time.

    `group`: the vocabulary is split over its ranks; `weight` and `bias` are the rows from `first` on of `vocabulary`
    rows, hidden and targets are the same on all ranks, and every rank gets the same loss and the whole gradient of
    hidden, or with `sum_hidden` False its own part of that sum. `budget`: bytes of logits at a time. `return_nll`: also
    the plain cross-entropy, reduced alike and without a gradient, which is what to report when label smoothing or
    z-loss are part of what is minimised.

    Raises ValueError naming the argument. On a GPU the targets are not looked at, for that would wait for it: a target
    outside the vocabulary reads nothing and gives the loss of a token whose logit is 0.
    """
    vocabulary = len(weight) if vocabulary is None else vocabulary
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    _check(hidden, weight, bias, first, vocabulary)
    check_options(options, reduction)
    check(budget > 0, "budget", f"is {budget} bytes")
    check_targets(targets, hidden, "hidden", ignore_index, vocabulary)
    rest = (*options, first, vocabulary, _name(group), sum_hidden, budget)
    ones = torch.ones(len(hidden), dtype=_exact(hidden), device=hidden.device)
    if reduction == "mean":
        ones = ones / (targets != ignore_index).sum()
    apply: Any = _TokenLosses.apply if reduction == "none" else _Loss.apply
    dense = None if bias is None else bias.contiguous()
    found = apply(hidden.contiguous(), weight.contiguous(), dense, targets.contiguous(), ones, *rest)
    return found if return_nll else found[0]


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, first: int, vocabulary: int
) -> None:
    check(hidden.ndim == 2, "hidden", f"has {hidden.ndim} dimensions, expected (T, C)")
    check(weight.ndim == 2, "weight", f"has {weight.ndim} dimensions, expected (V, C)")
    is_float(hidden, "hidden")
    width, wanted = weight.shape[1], hidden.shape[1]
    check(width == wanted, "weight", f"has width {width}, hidden has {wanted}")
    if bias is not None:
        shape = tuple(bias.shape)
        check(bias.shape == weight.shape[:1], "bias", f"has shape {shape}, expected ({len(weight)},)")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            check(x.dtype == hidden.dtype, name, f"is {x.dtype}, hidden is {hidden.dtype}")
            check(x.device == hidden.device, name, f"is on {x.device}, hidden is on {hidden.device}")
    check(
        first >= 0 and first + len(weight) <= vocabulary,
        "first",
        f"is {first}: {len(weight)} rows from there on do not lie in a vocabulary of {vocabulary}",
    )


def _name(group: dist.ProcessGroup | None) -> str:
    """Ops take strings; torch finds a group by its name."""
    return "" if group is None else str(group.group_name)


def ranks_of(name: str) -> dist.ProcessGroup | None:
    """None for the name of no group."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]
