"""Attention for users: with the arguments of the package flash-attn, and with those of torch's own.

    out = flash_attn_func(q, k, v, causal=True)                      # (B, S, H, D); k and v may have fewer heads
    out = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)      # (B, H, S, D)

bf16 and fp16, in the interpreter fp32 too; head dims to 256. Gradients of q, k, v and sinks, through the log-sum-exp
too.
Every result is the same bits in every run: nothing is added up by atomics, so `deterministic` has nothing to do.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from bigtrain_kernels.attention import attention
from bigtrain_kernels.checks import check, runs_here

_MOST_DIM = 256
_FAR = 2**30
"""Larger windows are as good as this, and sums with a position stay within int32."""
_DTYPES = (torch.bfloat16, torch.float16)


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = True,
    *,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(q k^T softmax_scale) v: q (B, S, H, D), k and v (B, N, K, D) -> (B, S, H, D), H a multiple of K.

    Query head h uses key head h K // H. Query m stands at key position m + N - S, so that the last query stands at
    the last key. With `causal` it sees the keys up to its position; with `window_size` (left, right) those no further
    away than that, -1 being no limit. `softmax_scale` is D^-0.5 by default. `softcap` c > 0: scores become
    c tanh(score / c). `sinks` (H,): a score per head that takes part in the softmax and has no value.
    `return_lse`: (out, lse), lse (B, H, S) fp32 the natural logarithm of the sum of exponentials, differentiable:
    what merges parts of the keys (ring attention). A query that sees no key gives 0, and lse -inf.

    Raises ValueError naming the argument and its value, before anything is launched. Dropout and ALiBi slopes are
    refused.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.ndim == 4, name, f"has shape {tuple(x.shape)}, expected 4 dimensions (B, S, H, D)")
        check(x.shape[0] == q.shape[0], name, f"has batch size {x.shape[0]}, q has {q.shape[0]}")
    _check_tensors(q, k, v, sinks)
    _check_numbers(dropout_p, softmax_scale, window_size, softcap, alibi_slopes)
    out, lse = _call(q, k, v, None, None, sinks, softmax_scale, causal, window_size, softcap)
    return (out, lse) if return_lse else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = True,
    *,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """flash_attn_func within each of many documents of any lengths: q (T, H, D), k and v (N, K, D) -> (T, H, D).

    Document i has the queries cu_seqlens_q[i] to [i + 1] and the keys cu_seqlens_k[i] to [i + 1]; either may be none.
    Both int32, on the device of q. The longest lengths are in the signature for other people's sake: the kernels take
    a list of blocks that is made on the device, and need none. lse is (H, T).

    Offsets must begin at 0, never decrease, and end at T and N. On a CPU this is checked, and a ValueError names what
    is wrong. On a GPU that would mean to wait for it; there the kernels clamp offsets into the tensors, and take tokens
    after the last document for one more document. Blocks at the end of a document compute with its neighbour's
    first rows too, at weight 0, so that an infinity or NaN there may show up in both.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.ndim == 3, name, f"has shape {tuple(x.shape)}, expected 3 dimensions (T, H, D)")
    _check_tensors(q, k, v, sinks)
    _check_numbers(dropout_p, softmax_scale, window_size, softcap, alibi_slopes)
    sides = (("q", cu_seqlens_q, q, max_seqlen_q), ("k", cu_seqlens_k, k, max_seqlen_k))
    for name, cu, x, longest in sides:
        _check_offsets(name, cu, x, longest)
    number = cu_seqlens_q.shape[0]
    check(
        cu_seqlens_k.shape[0] == number,
        "cu_seqlens_k",
        f"has {cu_seqlens_k.shape[0]} entries, cu_seqlens_q has {number}",
    )
    q, k, v = (x[None] for x in (q, k, v))
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    out, lse = _call(q, k, v, cu_q, cu_k, sinks, softmax_scale, causal, window_size, softcap)
    return (out[0], lse[0]) if return_lse else out[0]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch.nn.functional's: query (B, H, S, D), key and value (B, K, N, D) -> (B, H, S, D), a view.

    As there, `is_causal` aligns the first query with the first key, which flash_attn_func does with the last ones, and
    fewer key heads than query heads need `enable_gqa`. ValueError for a mask or dropout.
    """
    check(attn_mask is None, "attn_mask", "is given, and only is_causal is supported")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check(x.ndim == 4, name, f"has shape {tuple(x.shape)}, expected 4 dimensions (B, H, S, D)")
    H, K = query.shape[1], key.shape[1]
    check(enable_gqa or H == K, "enable_gqa", f"is False, and key has {K} heads where query has {H}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = (-1, -1)
    if is_causal:
        S, N = q.shape[1], k.shape[1]
        if N > S:  # nobody sees what comes later
            k, v = k[:, :S], v[:, :S]
        window = (-1, max(0, S - N))
    out: torch.Tensor = flash_attn_func(q, k, v, dropout_p, scale, window_size=window)
    return out.transpose(1, 2)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    runs_here(q)
    left, right = (min(x, _FAR) for x in window)
    if causal:
        right = 0
    op: Any = attention
    D = q.shape[-1]
    out, lse = op(q, k, v, cu_q, cu_k, sinks, D**-0.5 if scale is None else scale, left, right, softcap)
    return out, lse


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        exact = x.dtype == torch.float32 and not x.is_cuda  # in the interpreter, for tests
        check(x.dtype in _DTYPES or exact, name, f"is {x.dtype}, expected bfloat16 or float16")
        check(x.dtype == q.dtype, name, f"is {x.dtype}, q is {q.dtype}")
        check(x.device == q.device, name, f"is on {x.device}, q is on {q.device}")
        check(x.shape[-1] == q.shape[-1], name, f"has head dim {x.shape[-1]}, q has {q.shape[-1]}")
    (H, D), K = q.shape[-2:], k.shape[-2]
    check(0 < D <= _MOST_DIM, "q", f"has head dim {D}, expected 1 to {_MOST_DIM}")
    check(K > 0 and H % K == 0, "k", f"has {K} heads, which do not divide q's {H}")
    check(k.shape == v.shape, "v", f"has shape {tuple(v.shape)}, k has {tuple(k.shape)}")
    if sinks is not None:
        check(sinks.shape == (H,), "sinks", f"has shape {tuple(sinks.shape)}, expected ({H},)")
        check(sinks.is_floating_point(), "sinks", f"is {sinks.dtype}, expected a floating-point type")
        check(sinks.device == q.device, "sinks", f"is on {sinks.device}, q is on {q.device}")


def _check_numbers(
    dropout: float, scale: float | None, window: tuple[int, int], softcap: float, alibi: object
) -> None:
    check(dropout == 0, "dropout_p", f"is {dropout}: there is no dropout here")
    check(alibi is None, "alibi_slopes", "are given: there is no ALiBi here")
    check(scale is None or scale > 0, "softmax_scale", f"is {scale}, expected more than 0")
    check(
        len(window) == 2 and window[0] >= -1 and window[1] >= -1,
        "window_size",
        f"is {window}, expected two numbers of -1 or more",
    )
    check(softcap >= 0, "softcap", f"is {softcap}, expected 0 or more")


def _check_offsets(side: str, cu: torch.Tensor, x: torch.Tensor, longest: int | None) -> None:
    name = f"cu_seqlens_{side}"
    check(cu.ndim == 1 and cu.shape[0] > 0, name, f"has shape {tuple(cu.shape)}, expected (documents + 1,)")
    check(cu.dtype == torch.int32, name, f"is {cu.dtype}, expected int32")
    check(cu.device == x.device, name, f"is on {cu.device}, q is on {x.device}")
    check(longest is None or longest >= 0, f"max_seqlen_{side}", f"is {longest}, expected 0 or more")
    if torch.compiler.is_compiling() or cu.device.type != "cpu" or type(cu) is not torch.Tensor:
        return  # the content is unknown, or not to be waited for
    offsets = cu.tolist()
    check(offsets[0] == 0, name, f"starts at {offsets[0]}, expected 0")
    check(offsets[-1] == x.shape[0], name, f"ends at {offsets[-1]}, but {side} has {x.shape[0]} tokens")
    lengths = [after - before for before, after in pairwise(offsets)]
    check(min(lengths, default=0) >= 0, name, f"decreases: {offsets[:20]}")
    most = max(lengths, default=0)
    check(
        longest is None or most <= longest,
        f"max_seqlen_{side}",
        f"is {longest}, but a document has {most} tokens",
    )
