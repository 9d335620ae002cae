"""Fused attention in Triton: the forward pass, and a backward pass without atomics, so the same bits every time.

Tensors are packed: q (T, H, D), k and v (N, K, D), documents by cumulative lengths (cu_seqlens). H is a multiple of K
(grouped-query attention). Softmax runs in base 2, online over blocks of keys (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao 2023, arXiv:2307.08691). Row m of a document with M queries and N keys stands at key position
m + N - M (bottom-right alignment), and sees keys n with -left <= n - position <= right. Blocks of keys that a whole
block of rows sees need no mask; they are the middle one of three loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(s, scale, softcap, CAP: tl.constexpr):
    """Scaled and capped scores, in units of log2(e); the derivative by the dot product is `scale` x what follows."""
    s = s * scale
    if CAP:
        # tanh x = 1 - 2 / (1 + e^2x): the interpreter has no tanh.
        s = softcap * (1 - 2 / (1 + tl.exp2(2 * s / softcap * LOG2E)))
    return s * LOG2E


@triton.jit
def _seen(m, n, M, N, shift, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """(rows, keys): whether row m (a column vector) sees key n (a row vector)."""
    seen = (n < N) & (m < M)
    if RIGHT:
        seen = seen & (n - m - shift <= right)
    if LEFT:
        seen = seen & (m + shift - n <= left)
    return seen


@triton.jit
def _forward_keys(
    acc, total, peak, q, K, V, sk, sv, first, last, m, d, M, N, shift, left, right, scale, softcap,
    D: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Blocks of keys [first, last) into the running output, sum and maximum of a block of rows."""
    for start in tl.range(first, last, BN):
        n = start + tl.arange(0, BN)
        there = (n[None, :] < N) & (d[:, None] < D)
        k = tl.load(K + n[None, :].to(tl.int64) * sk + d[:, None], mask=there, other=0.0)
        s = _scores(tl.dot(q, k, input_precision="ieee"), scale, softcap, CAP)
        if MASK:
            s = tl.where(
                _seen(m[:, None], n[None, :], M, N, shift, left, right, LEFT, RIGHT), s, float("-inf")
            )
        new = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, 1)
        there = (n[:, None] < N) & (d[None, :] < D)
        v = tl.load(V + n[:, None].to(tl.int64) * sv + d[None, :], mask=there, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = new
    return acc, total, peak


@triton.jit
def forward(
    Q, K, V, OUT, LSE, SINK, CU_Q, CU_K, sq, sqh, sk, skh, sv, svh, so, soh, lse_rows,
    left, right, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """A block of BM rows of one head and document. OUT and LSE (H, T) fp32, natural logarithm, -inf without a key."""
    # The last rows see most keys under a causal mask: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, document = tl.program_id(1), tl.program_id(2)
    q0, k0 = tl.load(CU_Q + document).to(tl.int64), tl.load(CU_K + document).to(tl.int64)
    M = (tl.load(CU_Q + document + 1) - q0).to(tl.int32)
    N = (tl.load(CU_K + document + 1) - k0).to(tl.int32)
    if block * BM < M:
        shift = N - M
        m, d = block * BM + tl.arange(0, BM), tl.arange(0, DP)
        inside = (m[:, None] < M) & (d[None, :] < D)
        rows = (q0 + m)[:, None]
        q = tl.load(Q + rows * sq + head * sqh + d[None, :], mask=inside, other=0.0)
        K += k0 * sk + (head // G) * skh
        V += k0 * sv + (head // G) * svh
        first, last = 0, N
        whole_first, whole_last = 0, N // BN * BN
        if LEFT:
            first = tl.maximum(0, block * BM + shift - left) // BN * BN
            whole_first = (tl.maximum(0, block * BM + BM - 1 + shift - left) + BN - 1) // BN * BN
        if RIGHT:
            last = tl.maximum(0, tl.minimum(N, block * BM + BM + shift + right))
            whole_last = tl.maximum(0, tl.minimum(N, block * BM + shift + right + 1)) // BN * BN
        whole_first = tl.minimum(tl.maximum(whole_first, first), last)
        whole_last = tl.minimum(tl.maximum(whole_last, whole_first), tl.maximum(last, whole_first))
        acc = tl.zeros([BM, DP], tl.float32)
        total = tl.zeros([BM], tl.float32)
        peak = tl.full([BM], float("-inf"), tl.float32)
        if LEFT:
            acc, total, peak = _forward_keys(
                acc, total, peak, q, K, V, sk, sv, first, whole_first, m, d, M, N, shift, left, right, scale,
                softcap, D, BN, True, LEFT, RIGHT, CAP,
            )  # fmt: skip
        acc, total, peak = _forward_keys(
            acc, total, peak, q, K, V, sk, sv, whole_first, whole_last, m, d, M, N, shift, left, right, scale,
            softcap, D, BN, False, LEFT, RIGHT, CAP,
        )  # fmt: skip
        acc, total, peak = _forward_keys(
            acc, total, peak, q, K, V, sk, sv, whole_last, last, m, d, M, N, shift, left, right, scale,
            softcap, D, BN, True, LEFT, RIGHT, CAP,
        )  # fmt: skip
        if HAS_SINK:
            sink = tl.load(SINK + head).to(tl.float32) * LOG2E
            new = tl.maximum(peak, sink)
            fade = tl.exp2(peak - new)
            total = total * fade + tl.exp2(sink - new)
            acc = acc * fade[:, None]
            peak = new
        some = total > 0
        out = acc / tl.where(some, total, 1.0)[:, None]
        lse = tl.where(some, (peak + tl.log2(tl.where(some, total, 1.0))) / LOG2E, float("-inf"))
        tl.store(OUT + rows * so + head * soh + d[None, :], out.to(OUT.dtype.element_ty), mask=inside)
        tl.store(LSE + head.to(tl.int64) * lse_rows + q0 + m, lse, mask=m < M)


@triton.jit
def row_terms(
    OUT, DO, DLSE, DELTA, so, soh, sdo, sdoh, rows, T,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """DELTA (H, T) = sum over D of OUT x DO, minus the gradient of LSE: what every score's gradient is reduced by."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    head, d = tl.program_id(1), tl.arange(0, DP)
    inside = (m[:, None] < T) & (d[None, :] < D)
    wide = m[:, None].to(tl.int64)
    o = tl.load(OUT + wide * so + head * soh + d[None, :], mask=inside, other=0.0).to(tl.float32)
    do = tl.load(DO + wide * sdo + head * sdoh + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = head.to(tl.int64) * rows + m
    dlse = tl.load(DLSE + at, mask=m < T, other=0.0)
    tl.store(DELTA + at, tl.sum(o * do, 1) - dlse, mask=m < T)


@triton.jit
def _score_gradient(s, p, dp, delta, scale, softcap, CAP: tl.constexpr):
    """Gradient of the dot product q k: p (dp - delta), through the cap and the scale. s in units of log2(e)."""
    ds = p * (dp - delta) * scale
    if CAP:
        share = s / (LOG2E * softcap)
        ds = ds * (1 - share * share)
    return ds


@triton.jit
def backward_queries(
    Q, K, V, DO, DQ, LSE, DELTA, CU_Q, CU_K, sq, sqh, sk, skh, sv, svh, sdo, sdoh, sdq, sdqh, lse_rows,
    left, right, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of BM queries of one head and document."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, document = tl.program_id(1), tl.program_id(2)
    q0, k0 = tl.load(CU_Q + document).to(tl.int64), tl.load(CU_K + document).to(tl.int64)
    M = (tl.load(CU_Q + document + 1) - q0).to(tl.int32)
    N = (tl.load(CU_K + document + 1) - k0).to(tl.int32)
    if block * BM < M:
        shift = N - M
        m, d = block * BM + tl.arange(0, BM), tl.arange(0, DP)
        inside = (m[:, None] < M) & (d[None, :] < D)
        rows = (q0 + m)[:, None]
        q = tl.load(Q + rows * sq + head * sqh + d[None, :], mask=inside, other=0.0)
        do = tl.load(DO + rows * sdo + head * sdoh + d[None, :], mask=inside, other=0.0)
        at = head.to(tl.int64) * lse_rows + q0 + m
        lse = tl.load(LSE + at, mask=m < M, other=0.0)
        lse = (
            tl.where(lse == float("-inf"), 0.0, lse) * LOG2E
        )  # a row without keys: all its scores are masked
        delta = tl.load(DELTA + at, mask=m < M, other=0.0)
        K += k0 * sk + (head // G) * skh
        V += k0 * sv + (head // G) * svh
        first, last = 0, N
        if LEFT:
            first = tl.maximum(0, block * BM + shift - left) // BN * BN
        if RIGHT:
            last = tl.maximum(0, tl.minimum(N, block * BM + BM + shift + right))
        dq = tl.zeros([BM, DP], tl.float32)
        for start in tl.range(first, last, BN):
            n = start + tl.arange(0, BN)
            there = (n[None, :] < N) & (d[:, None] < D)
            k = tl.load(K + n[None, :].to(tl.int64) * sk + d[:, None], mask=there, other=0.0)
            v = tl.load(V + n[None, :].to(tl.int64) * sv + d[:, None], mask=there, other=0.0)
            s = _scores(tl.dot(q, k, input_precision="ieee"), scale, softcap, CAP)
            seen = _seen(m[:, None], n[None, :], M, N, shift, left, right, LEFT, RIGHT)
            p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
            dp = tl.dot(do, v, input_precision="ieee")
            ds = _score_gradient(s, p, dp, delta[:, None], scale, softcap, CAP)
            dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision="ieee")
        tl.store(DQ + rows * sdq + head * sdqh + d[None, :], dq.to(DQ.dtype.element_ty), mask=inside)


@triton.jit
def backward_keys(
    Q, K, V, DO, DK, DV, LSE, DELTA, CU_Q, CU_K, sq, sqh, sk, skh, sv, svh, sdo, sdoh, sdk, sdkh, sdv, sdvh,
    lse_rows, left, right, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of BN keys and values of one key head and document, over its G query heads."""
    block, group, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0, k0 = tl.load(CU_Q + document).to(tl.int64), tl.load(CU_K + document).to(tl.int64)
    M = (tl.load(CU_Q + document + 1) - q0).to(tl.int32)
    N = (tl.load(CU_K + document + 1) - k0).to(tl.int32)
    if block * BN < N:
        shift = N - M
        n, d = block * BN + tl.arange(0, BN), tl.arange(0, DP)
        inside = (n[:, None] < N) & (d[None, :] < D)
        rows = (k0 + n)[:, None]
        k = tl.load(K + rows * sk + group * skh + d[None, :], mask=inside, other=0.0)
        v = tl.load(V + rows * sv + group * svh + d[None, :], mask=inside, other=0.0)
        first, last = 0, M
        if RIGHT:
            first = tl.maximum(0, block * BN - shift - right) // BM * BM
        if LEFT:
            last = tl.maximum(0, tl.minimum(M, block * BN + BN - shift + left))
        dk = tl.zeros([BN, DP], tl.float32)
        dv = tl.zeros([BN, DP], tl.float32)
        for head in range(group * G, group * G + G):
            for start in tl.range(first, last, BM):
                m = start + tl.arange(0, BM)
                there = (m[:, None] < M) & (d[None, :] < D)
                wide = (q0 + m)[:, None]
                q = tl.load(Q + wide * sq + head * sqh + d[None, :], mask=there, other=0.0)
                do = tl.load(DO + wide * sdo + head * sdoh + d[None, :], mask=there, other=0.0)
                at = lse_rows * head + q0 + m
                lse = tl.load(LSE + at, mask=m < M, other=0.0)
                lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E
                delta = tl.load(DELTA + at, mask=m < M, other=0.0)
                s = _scores(tl.dot(k, tl.trans(q), input_precision="ieee"), scale, softcap, CAP)  # (BN, BM)
                seen = _seen(m[None, :], n[:, None], M, N, shift, left, right, LEFT, RIGHT)
                p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                dp = tl.dot(v, tl.trans(do), input_precision="ieee")
                ds = _score_gradient(s, p, dp, delta[None, :], scale, softcap, CAP)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        tl.store(DK + rows * sdk + group * sdkh + d[None, :], dk.to(DK.dtype.element_ty), mask=inside)
        tl.store(DV + rows * sdv + group * sdvh + d[None, :], dv.to(DV.dtype.element_ty), mask=inside)
