"""Attention as an op of PyTorch: fused forward and backward, under autograd, compile and recomputation.

    out = flash_attn_func(q, k, v, causal=True)                      # (B, S, H, D); k and v may have fewer heads
    out = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True)
    out = attend(q, k, v, is_causal=True)                            # (B, H, S, D), as torch's own attention

The first two have the arguments of the package flash-attn. Results are the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch

from bigtrain_kernels import attention_kernels as kernels
from bigtrain_kernels.checks import INTERPRETED, check, runs_here

_MOST_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def blocks(dim: int, part: str) -> tuple[int, int, int, int]:
    """(rows, keys, warps, pipeline stages) of a kernel for heads of `dim`: fixed, so no step waits for a tuner.

    From offline compilation for sm_90 (registers, shared memory, no spills: tests/kernels/test_compile_gate.py).
    """
    if INTERPRETED:
        return 32, 32, 4, 1
    if part == "forward":
        return {32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (64, 64, 4, 2)}.get(dim, (64, 32, 8, 2))
    if part == "queries":
        return {32: (128, 64, 4, 2), 64: (128, 64, 8, 2), 128: (64, 64, 4, 2)}.get(dim, (32, 32, 8, 1))
    return {32: (64, 64, 4, 2), 64: (64, 128, 8, 2), 128: (32, 64, 8, 2)}.get(dim, (32, 32, 8, 1))


@torch.library.custom_op("bigtrain::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, H, D = q.shape
    q, k, v = (_rows(x) for x in (q, k, v))
    out = torch.zeros((T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.full((H, T), -torch.inf, dtype=torch.float32, device=q.device)
    if not T or not H:
        return out, lse
    DP = _power(D)
    BM, BN, warps, stages = blocks(DP, "forward")
    grid = (-(-max_q // BM), H, len(cu_q) - 1)
    if 0 not in grid:
        kernels.forward[grid](
            q, k, v, out, lse, lse if sinks is None else sinks, cu_q, cu_k,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], T,
            left, right, scale, softcap,
            G=H // k.shape[1], D=D, DP=DP, BM=BM, BN=BN, LEFT=left >= 0, RIGHT=right >= 0, CAP=softcap > 0,
            HAS_SINK=sinks is not None, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    T, H, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((H, T), dtype=torch.float32)


@torch.library.custom_op("bigtrain::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, and DELTA (H, T), which the sinks' needs."""
    T, H, D = q.shape
    q, k, v, grad = (_rows(x) for x in (q, k, v, grad))
    grad_lse = grad_lse.contiguous()
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.zeros((H, T), dtype=torch.float32, device=q.device)
    documents = len(cu_q) - 1
    if not T or not H or not documents:
        return dq, dk, dv, delta
    DP, K = _power(D), k.shape[1]
    kernels.row_terms[(-(-T // 64), H)](
        out,
        grad,
        grad_lse,
        delta,
        *out.stride()[:2],
        *grad.stride()[:2],
        T,
        T,
        D=D,
        DP=DP,
        BM=64,
        num_warps=4,
    )
    same: dict[str, Any] = {"G": H // K, "D": D, "DP": DP}
    same |= {"LEFT": left >= 0, "RIGHT": right >= 0, "CAP": softcap > 0}
    numbers = (T, left, right, scale, softcap)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2])
    BM, BN, warps, stages = blocks(DP, "queries")
    if max_q:
        kernels.backward_queries[(-(-max_q // BM), H, documents)](
            q, k, v, grad, dq, lse, delta, cu_q, cu_k, *strides, *dq.stride()[:2], *numbers,
            **same, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    BM, BN, warps, stages = blocks(DP, "keys")
    if max_k:
        kernels.backward_keys[(-(-max_k // BN), K, documents)](
            q, k, v, grad, dk, dv, lse, delta, cu_q, cu_k, *strides, *dk.stride()[:2], *dv.stride()[:2], *numbers,
            **same, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv, delta


@_attention_backward.register_fake
def _(grad: Any, grad_lse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> Any:
    return *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), torch.empty_like(lse)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_q, cu_k, *numbers, sinks = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, sinks)
    ctx.numbers = numbers


def _backward(ctx: Any, grad: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, cu_q, cu_k, sinks = ctx.saved_tensors
    dq, dk, dv, delta = _attention_backward(grad, grad_lse, q, k, v, out, lse, cu_q, cu_k, *ctx.numbers)
    dsinks = None
    if sinks is not None:
        # The sink is a key whose value is 0: the gradient of its score is p (0 - delta).
        share = torch.exp(sinks.float()[:, None] - lse)
        dsinks = -(share * delta).sum(1).to(sinks.dtype)
    return dq, dk, dv, *[None] * 8, dsinks


_attention.register_autograd(_backward, setup_context=_remember)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels step along D by 1, and along tokens and heads by any stride, 0 too."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _power(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over packed documents: q (T, H, D), k and v (N, K, D), H a multiple of K; out (T, H, D).

    Document i has the queries cu_seqlens_q[i] to [i + 1] and the keys cu_seqlens_k[i] to [i + 1], both int32; either
    may be empty. A query stands at the key position (its number + keys - queries), so the last query sees the last
    key when `causal`. `window_size` (left, right): keys further away are not seen; -1 is no limit. `softcap` c > 0:
    scores become c tanh(score / c). `sinks` (H,): a score per head that takes part in the softmax and has no value.
    `return_lse`: also the natural logarithm of the sum of exponentials (H, T) fp32, differentiable. A query that sees
    no key gives 0, and -inf.

    Raises ValueError naming the argument; on a GPU the content of cu_seqlens is not looked at, for that would wait for
    it: lengths beyond max_seqlen are cut there.
    """
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    left, right = window_size
    right = 0 if causal else right
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size, softcap, sinks)
    op: Any = _attention
    out, lse = op(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, left, right, softcap, sinks
    )
    return (out, lse) if return_lse else out


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """As flash_attn_varlen_func, of sequences of one length: q (B, S, H, D), k and v (B, N, K, D).

    Out (B, S, H, D), lse (B, H, S).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.ndim == 4, name, f"has {x.ndim} dimensions, expected (B, S, H, D)")
        check(x.shape[0] == q.shape[0], name, f"has batch size {x.shape[0]}, q has {q.shape[0]}")
    B, S, H, _ = q.shape
    N = k.shape[1]
    cu_q, cu_k = (torch.arange(B + 1, dtype=torch.int32, device=q.device) * n for n in (S, N))
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out, lse = flash_attn_varlen_func(
        *flat, cu_q, cu_k, S, N, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, sinks=sinks, return_lse=True,
    )  # fmt: skip
    out = out.reshape(q.shape)
    return (out, lse.reshape(H, B, S).transpose(0, 1)) if return_lse else out


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool = False, scale: float | None = None
) -> torch.Tensor:
    """As torch's F.scaled_dot_product_attention(..., enable_gqa=True) without a mask: q (B, H, S, D) -> (B, H, S, D).

    With fewer queries than keys the causal mask is aligned at the end, where torch's is at the start.
    """
    parts = (x.transpose(1, 2) for x in (q, k, v))
    out: torch.Tensor = flash_attn_func(*parts, softmax_scale=scale, causal=is_causal)
    return out.transpose(1, 2)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    window: tuple[int, int],
    softcap: float,
    sinks: torch.Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.ndim == 3, name, f"has {x.ndim} dimensions, expected (T, H, D)")
        check(x.dtype in _DTYPES, name, f"is {x.dtype}, expected bfloat16, float16 or float32")
        check(x.dtype == q.dtype, name, f"is {x.dtype}, q is {q.dtype}")
        check(x.device == q.device, name, f"is on {x.device}, q is on {q.device}")
        check(x.shape[2] == q.shape[2], name, f"has head dim {x.shape[2]}, q has {q.shape[2]}")
    check(0 < q.shape[2] <= _MOST_DIM, "q", f"has head dim {q.shape[2]}, expected 1 to {_MOST_DIM}")
    heads = f"has {k.shape[1]} heads, which do not divide q's {q.shape[1]}"
    check(k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0, "k", heads)
    check(k.shape == v.shape, "v", f"has shape {tuple(v.shape)}, k has {tuple(k.shape)}")
    check(len(cu_q) == len(cu_k), "cu_seqlens_k", f"has {len(cu_k)} entries, cu_seqlens_q has {len(cu_q)}")
    check(max_q >= 0, "max_seqlen_q", f"is {max_q}")
    check(max_k >= 0, "max_seqlen_k", f"is {max_k}")
    check(window[0] >= -1 and window[1] >= -1, "window_size", f"is {window}, expected -1 or more")
    check(softcap >= 0, "softcap", f"is {softcap}, expected 0 or more")
    if sinks is not None:
        check(
            sinks.shape == (q.shape[1],), "sinks", f"has shape {tuple(sinks.shape)}, expected ({q.shape[1]},)"
        )
    for name, cu, total, most in (("q", cu_q, q.shape[0], max_q), ("k", cu_k, k.shape[0], max_k)):
        label = f"cu_seqlens_{name}"
        check(cu.ndim == 1 and len(cu) > 0, label, f"has shape {tuple(cu.shape)}, expected (documents + 1,)")
        check(cu.dtype == torch.int32, label, f"is {cu.dtype}, expected int32")
        check(cu.device == q.device, label, f"is on {cu.device}, q is on {q.device}")
        if cu.device.type == "cpu" and not torch.compiler.is_compiling() and type(cu) is torch.Tensor:
            check(int(cu[0]) == 0, label, f"starts at {int(cu[0])}, expected 0")
            check(int(cu[-1]) == total, label, f"ends at {int(cu[-1])}, but {name} has {total} tokens")
            lengths = cu.diff()
            check(bool((lengths >= 0).all()), label, f"decreases: {cu.tolist()[:20]}")
            longest = int(lengths.max()) if len(lengths) else 0
            check(longest <= most, f"max_seqlen_{name}", f"is {most}, but a document has {longest} tokens")
    runs_here(q)
