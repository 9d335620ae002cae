"""Attention as operators of PyTorch: under autograd, torch.compile, recomputation, fake tensors and FLOP counters.

attention_api.py has the functions for users. Results are the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from bigtrain_kernels import attention_backward, attention_forward
from bigtrain_kernels.attention_cost import pairs_of
from bigtrain_kernels.attention_path import on_hopper
from bigtrain_kernels.attention_tiles import described


@torch.library.custom_op("bigtrain::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, S, H, D), k and v (B, N, K, D) -> out (B, S, H, D), lse (B, H, S) fp32; packed documents have B = 1.

    `left` and `right` of the query's position are seen, -1 for all. Arguments are checked in attention_api.py.
    """
    B, S, H, _ = q.shape
    if 0 in q.shape or 0 in k.shape:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = torch.full((B, H, S), -torch.inf, dtype=torch.float32, device=q.device)
        return out, lse if sinks is None else lse.copy_(sinks[None, :, None])
    q, k, v = map(described, (q, k, v))
    if on_hopper(q, softcap):
        from bigtrain_kernels import attention_hopper  # Gluon, which the interpreter does not know

        return attention_hopper.forward(q, k, v, cu_q, cu_k, sinks, scale=scale, left=left, right=right)
    return attention_forward.forward(
        q, k, v, cu_q, cu_k, sinks, scale=scale, left=left, right=right, softcap=softcap
    )


@attention.register_fake
def _(q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, S), dtype=torch.float32)


@torch.library.custom_op("bigtrain::attention_backward", mutates_args=())
def attention_gradients(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, and delta (B, H, S) fp32: see attention_backward.py."""
    if 0 in q.shape or 0 in k.shape:
        contiguous = torch.contiguous_format
        dq, dk, dv = (torch.zeros_like(x, memory_format=contiguous) for x in (q, k, v))
        return dq, dk, dv, -grad_lse.contiguous()
    q, k, v, grad = map(described, (q, k, v, grad))
    grad_lse, out, lse = (x.contiguous() for x in (grad_lse, out, lse))
    kernels: Any = attention_backward
    if on_hopper(q, softcap):
        from bigtrain_kernels import attention_hopper_backward as kernels
    numbers: Any = {"scale": scale, "left": left, "right": right, "softcap": softcap}
    return attention_backward.backward(
        grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, **numbers, kernels=kernels
    )


@attention_gradients.register_fake
def _(grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_q, cu_k, sinks, *numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, sinks)
    ctx.numbers = numbers


def _differentiate(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, cu_q, cu_k, sinks = ctx.saved_tensors
    op: Any = attention_gradients
    dq, dk, dv, delta = op(grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, *ctx.numbers)
    dsinks = None
    if sinks is not None:
        # A sink is one more key, whose value is 0: its score has the gradient p (0 - delta).
        p = torch.exp(sinks.float()[:, None] - lse)
        dsinks = -(p * delta).nan_to_num(0.0).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, None, None, dsinks, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_remember)


@register_flop_formula(torch.ops.bigtrain.attention, get_raw=True)
def _flops(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, sinks: Any, scale: Any, left: int, right: int, *_: Any,
           out_val: Any = None, **more: Any) -> int:  # fmt: skip
    """2 products of 2 D operations for each query and key that see each other."""
    return int(4 * q.shape[2] * q.shape[3] * pairs_of(q, k, cu_q, cu_k, left, right))


@register_flop_formula(torch.ops.bigtrain.attention_backward, get_raw=True)
def _backward_flops(grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, cu_q: Any, cu_k: Any,
                    scale: Any, left: int, right: int, *_: Any, out_val: Any = None, **more: Any) -> int:  # fmt: skip
    """5 products: that these kernels compute the scores twice is no useful work."""
    return int(10 * q.shape[2] * q.shape[3] * pairs_of(q, k, cu_q, cu_k, left, right))
