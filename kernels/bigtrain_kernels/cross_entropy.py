"""Cross-entropy of logits that are there: one pass for the loss, one for the gradient, nothing kept but a row's sum.

linear_cross_entropy.py makes the logits too, and never holds them all.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton

from bigtrain_kernels import cross_entropy_kernels as kernels
from bigtrain_kernels.checks import INTERPRETED, check, is_float, runs_here

Reduction = Literal["none", "mean", "sum"]
_BLOCK = 64 if INTERPRETED else 4096


class Options(NamedTuple):
    """What a token's loss is."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


class Sums(NamedTuple):
    """Of rows, fp32: see cross_entropy_kernels.row_sums. `lse`: log-sum-exp over the vocabulary."""

    lse: torch.Tensor
    picked: torch.Tensor
    mean: torch.Tensor


def partial_sums(logits: torch.Tensor, targets: torch.Tensor, first: int, softcap: float) -> torch.Tensor:
    """PEAK, TOTAL, PICKED and SUM (4, T) of logits (T, v), the part from `first` on of a vocabulary; T > 0."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    found = torch.empty(4, len(logits), dtype=exact, device=logits.device)
    kernels.row_sums[(len(logits),)](
        logits, targets, *found, logits.stride(0), logits.shape[1], first, softcap,
        BLOCK=_block(logits), CAP=softcap > 0, num_warps=8,
    )  # fmt: skip
    return found


def whole_sums(found: torch.Tensor, vocabulary: int) -> Sums:
    """The sums over the whole vocabulary, of every part's (parts x 4, T)."""
    peaks, totals, picked, plain = found.unflatten(0, (-1, 4)).unbind(1)
    peak = peaks.amax(0)
    base = peak.masked_fill(peak == -torch.inf, 0)
    lse = base + (totals * torch.exp(peaks - base)).sum(0).log()
    return Sums(lse, picked.sum(0), plain.sum(0) / vocabulary)


def token_losses(sums: Sums, counted: torch.Tensor, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and plain cross-entropy by token; 0 where nothing counts."""
    eps = options.label_smoothing
    nll = sums.lse - sums.picked
    loss = (1 - eps) * nll + eps * (sums.lse - sums.mean) + options.z_loss * sums.lse.square()
    return loss.masked_fill(~counted, 0), nll.masked_fill(~counted, 0)


def write_gradient(
    out: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    token_weight: torch.Tensor,
    options: Options,
    *,
    first: int,
    vocabulary: int,
) -> None:
    """The gradient of sum(token_weight x loss) by logits (T, v), T > 0, into `out`, which may be `logits` itself."""
    kernels.gradient[(len(logits),)](
        logits, targets, lse, token_weight, out, logits.stride(0), out.stride(0), logits.shape[1], first,
        vocabulary, options.softcap, options.label_smoothing, options.z_loss,
        BLOCK=_block(logits), CAP=options.softcap > 0, num_warps=8,
    )  # fmt: skip


def _block(logits: torch.Tensor) -> int:
    return min(_BLOCK, max(64, triton.next_power_of_2(logits.shape[1])))


@torch.library.custom_op("bigtrain::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss by token and log-sum-exp (T,) of logits (T, V)."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    if not len(logits):
        empty = logits.new_empty(0, dtype=torch.promote_types(logits.dtype, torch.float32))
        return empty, empty.clone()
    sums = whole_sums(partial_sums(logits, targets, 0, softcap), logits.shape[1])
    return token_losses(sums, targets != ignore_index, options)[0], sums.lse


@_cross_entropy.register_fake
def _(logits: Any, targets: Any, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    exact = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape[:1], dtype=exact), logits.new_empty(logits.shape[:1], dtype=exact)


@torch.library.custom_op("bigtrain::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if len(logits):
        weight = grad.where(targets != ignore_index, 0.0).contiguous()
        options = Options(ignore_index, label_smoothing, z_loss, softcap)
        write_gradient(out, logits, targets, lse, weight, options, first=0, vocabulary=logits.shape[1])
    return out


@_cross_entropy_backward.register_fake
def _(grad: Any, logits: Any, *rest: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)  # type: ignore[no-any-return]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, *options = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.options = options
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    op: Any = _cross_entropy_backward
    return op(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


_cross_entropy.register_autograd(_backward, setup_context=_remember)


def cross_entropy_bytes(T: int, V: int, size: int, *, backward: bool = False) -> int:
    """Bytes of the logits read (and of their gradient written) at least once, elements of `size` bytes."""
    return (2 if backward else 1) * T * V * size


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """Cross-entropy of logits (T, V) against targets (T,) int64, in fp32; options as in linear_cross_entropy.

    Raises ValueError naming the argument; of targets on a GPU see linear_cross_entropy.
    """
    check(logits.ndim == 2, "logits", f"has {logits.ndim} dimensions, expected (T, V)")
    is_float(logits, "logits")
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    check_options(options, reduction)
    check_targets(targets, logits, "logits", ignore_index, logits.shape[1])
    op: Any = _cross_entropy
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    losses: torch.Tensor = op(logits, targets.contiguous(), *options)[0]
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


def check_options(options: Options, reduction: str) -> None:
    """Raises ValueError naming the option."""
    _, smoothing, z_loss, softcap = options
    check(0 <= smoothing < 1, "label_smoothing", f"is {smoothing}, expected [0, 1)")
    check(z_loss >= 0, "z_loss", f"is {z_loss}, expected 0 or more")
    check(softcap >= 0, "softcap", f"is {softcap}, expected 0 or more")
    known = reduction in ("none", "mean", "sum")
    check(known, "reduction", f'is {reduction!r}, expected "none", "mean" or "sum"')


def check_targets(targets: torch.Tensor, rows: torch.Tensor, name: str, ignore: int, vocabulary: int) -> None:
    """Raises ValueError unless targets (T,) int64 fit the rows of the argument `name`; values are seen on a CPU."""
    shape = tuple(targets.shape)
    check(targets.shape == rows.shape[:1], "targets", f"has shape {shape}, expected ({len(rows)},)")
    check(targets.dtype == torch.int64, "targets", f"is {targets.dtype}, expected int64")
    check(targets.device == rows.device, "targets", f"is on {targets.device}, {name} is on {rows.device}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and type(targets) is torch.Tensor:
        wrong = targets[(targets != ignore) & ((targets < 0) | (targets >= vocabulary))].tolist()[:5]
        check(not wrong, "targets", f"hold {wrong}, outside the vocabulary of {vocabulary}")
    runs_here(rows)
