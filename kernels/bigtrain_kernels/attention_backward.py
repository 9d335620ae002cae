"""The backward pass of attention in portable Triton: no atomics, so the same bits every time.

Scores are computed twice, for the gradient of the queries and for that of keys and values: seven products of matrices
where a pass with atomics on the queries' gradient has five (Dao 2023, arXiv:2307.08691, algorithm 2). With

    p = exp(s - lse),  dv = p^T do,  dp = do v^T,  ds = p (dp - delta),  dq = ds k scale,  dk = ds^T q scale

and delta = rowsum(do out) - dlse, for the gradient of lse by s is p.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# (a kernel's arguments are typed by Triton when it is compiled)

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from bigtrain_kernels.attention_blocks import Blocks, blocks_for
from bigtrain_kernels.attention_forward import LOG2E, capped
from bigtrain_kernels.attention_tiles import (
    descriptor,
    given,
    key_range,
    power,
    query_range,
    seen,
    tile,
    tiles_of,
)


@triton.jit(do_not_specialize=["rows", "queries"])
def attention_delta(
    OUT, GRAD, LSE, GRAD_LSE, LSE2, DELTA, rows, queries, heads, gb, gs, gh,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta of BM of the B S H (row, head) pairs, and their lse in units of log2(e), both (B, H, S).

    OUT is contiguous (B, S, H, D), GRAD has strides. For a row that saw no key lse is +inf, which makes its p 0.
    """
    pair = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    head, row = pair % heads, pair // heads
    batch, row = row // queries, row % queries
    d = tl.arange(0, DP)
    inside = (pair < rows.to(tl.int64) * heads)[:, None] & (d < D)[None, :]
    out = tl.load(OUT + pair[:, None] * D + d[None, :], mask=inside, other=0.0)
    at = batch * gb + row * gs + head * gh
    grad = tl.load(GRAD + at[:, None] + d[None, :], mask=inside, other=0.0)
    to = (batch * heads + head) * queries + row
    there = pair < rows.to(tl.int64) * heads
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    delta -= tl.load(GRAD_LSE + to, mask=there, other=0.0)
    lse = tl.load(LSE + to, mask=there, other=0.0)
    blind = lse == float("-inf")
    tl.store(LSE2 + to, tl.where(blind, float("inf"), lse * LOG2E), mask=there)
    tl.store(DELTA + to, tl.where(blind, 0.0, delta), mask=there)  # 0 times what a caller made of -inf


@triton.jit
def _queries_keys(
    dq, q, do, lse, delta, K, V, batch, group, k0, first, last, m, N, shift, left, right, scale, softcap,
    DP: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Blocks of keys [first, last) into the gradient of a block of rows, without the factor `scale`."""
    for start in tl.range(first, last, BN):
        k = K.load([batch, group, k0 + start, 0]).reshape(BN, DP)
        v = V.load([batch, group, k0 + start, 0]).reshape(BN, DP)
        s = tl.dot(q, k.T)
        unit = scale * LOG2E
        if CAP:
            s = capped(s, scale, softcap)
            unit = LOG2E
        p = tl.exp2(s * unit - lse[:, None])
        if MASK:
            n = start + tl.arange(0, BN)
            p = tl.where(seen(m[:, None], n[None, :], N, shift, left, right, LEFT, RIGHT), p, 0.0)
        dp = tl.dot(do, v.T)
        ds = p * (dp - delta[:, None])
        if CAP:
            ds = ds * (1 - (s / softcap) * (s / softcap))
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["documents", "queries", "keys", "tiles", "blocks", "left", "right"])
def attention_backward_queries(
    Q, K, V, GRAD, DQ, LSE2, DELTA, TILES, CU_Q, CU_K, documents, queries, keys, tiles, blocks, heads, left, right,
    scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of BM queries of one head; programs in the order of the forward pass."""
    program = tl.program_id(0)
    index = tiles - 1 - program // G % tiles
    group = program // G // tiles
    head = group * G + program % G
    batch, block, q0, M, k0, N = tile(TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED)
    if block >= 0:
        shift = N - M
        m = block * BM + tl.arange(0, BM)
        q = Q.load([batch, head, q0 + block * BM, 0]).reshape(BM, DP)
        do = GRAD.load([batch, head, q0 + block * BM, 0]).reshape(BM, DP)
        at = (tl.cast(batch, tl.int64) * heads + head) * queries + q0
        lse = tl.load(LSE2 + at + m, mask=m < M, other=float("inf"))
        delta = tl.load(DELTA + at + m, mask=m < M, other=0.0)
        dq = tl.zeros([BM, DP], tl.float32)
        first, whole, until, last = key_range(
            block * BM, tl.minimum(BM, M - block * BM), N, shift, left, right, BN, LEFT, RIGHT
        )
        if LEFT:
            dq = _queries_keys(
                dq, q, do, lse, delta, K, V, batch, group, k0, first, tl.minimum(whole, last), m, N, shift, left,
                right, scale, softcap, DP, BN, True, LEFT, RIGHT, CAP,
            )  # fmt: skip
        dq = _queries_keys(
            dq, q, do, lse, delta, K, V, batch, group, k0, whole, until, m, N, shift, left,
            right, scale, softcap, DP, BN, False, LEFT, RIGHT, CAP,
        )  # fmt: skip
        dq = _queries_keys(
            dq, q, do, lse, delta, K, V, batch, group, k0, tl.maximum(whole, until), last, m, N, shift, left,
            right, scale, softcap, DP, BN, True, LEFT, RIGHT, CAP,
        )  # fmt: skip
        d = tl.arange(0, DP)
        rows = tl.cast(batch, tl.int64) * queries + q0 + m
        tl.store(
            DQ + (rows * heads + head)[:, None] * D + d[None, :],
            (dq * scale).to(DQ.dtype.element_ty),
            mask=(m[:, None] < M) & (d[None, :] < D),
        )


@triton.jit(do_not_specialize=["documents", "queries", "keys", "tiles", "blocks", "left", "right"])
def attention_backward_keys(
    Q, K, V, GRAD, DK, DV, LSE2, DELTA, TILES, CU_Q, CU_K, documents, queries, keys, tiles, blocks, heads, left,
    right, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of BN keys and values of one key head, from its G query heads one after another.

    One loop over heads and blocks of queries, always masked: apart, the loops spill. Rows past the end have p = 0 by
    their lse, and keys past the end are not stored, so without a window or causal mask none is needed.
    """
    index = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles
    batch, block, q0, M, k0, N = tile(TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED)
    if block >= 0:
        shift = N - M
        n = block * BN + tl.arange(0, BN)
        k = K.load([batch, group, k0 + block * BN, 0]).reshape(BN, DP)
        v = V.load([batch, group, k0 + block * BN, 0]).reshape(BN, DP)
        dk = tl.zeros([BN, DP], tl.float32)
        dv = tl.zeros([BN, DP], tl.float32)
        terms = (tl.cast(batch, tl.int64) * heads + group * G) * queries + q0
        LSE2 += terms
        DELTA += terms
        first, last = query_range(
            block * BN, tl.minimum(BN, N - block * BN), M, shift, left, right, BM, LEFT, RIGHT
        )
        steps = tl.maximum(0, last - first + BM - 1) // BM
        for step in tl.range(0, steps * G):
            head = group * G + step // steps
            m0 = first + step % steps * BM
            m = m0 + tl.arange(0, BM)
            q = Q.load([batch, head, q0 + m0, 0]).reshape(BM, DP)
            do = GRAD.load([batch, head, q0 + m0, 0]).reshape(BM, DP)
            at = tl.cast(step // steps, tl.int64) * queries + m
            lse = tl.load(LSE2 + at, mask=m < M, other=float("inf"))
            delta = tl.load(DELTA + at, mask=m < M, other=0.0)
            s = tl.dot(k, q.T)  # (BN, BM)
            unit = scale * LOG2E
            if CAP:
                s = capped(s, scale, softcap)
                unit = LOG2E
            p = tl.exp2(s * unit - lse[None, :])
            if RIGHT:
                p = tl.where(n[:, None] <= (m + (shift + right))[None, :], p, 0.0)
            if LEFT:
                p = tl.where(n[:, None] >= (m + (shift - left))[None, :], p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv)
            dp = tl.dot(v, do.T)
            ds = p * (dp - delta[None, :])
            if CAP:
                ds = ds * (1 - (s / softcap) * (s / softcap))
            dk = tl.dot(ds.to(q.dtype), q, dk)
        # Read again what the loop has no use for: 255 registers are just enough for it.
        batch, block, q0, M, k0, N = tile(
            TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED, True
        )
        n = block * BN + tl.arange(0, BN)
        d = tl.arange(0, DP)
        rows = tl.cast(batch, tl.int64) * keys + k0 + n
        to = (rows * (heads // G) + group)[:, None] * D + d[None, :]
        inside = (n[:, None] < N) & (d[None, :] < D)
        tl.store(DK + to, (dk * scale).to(DK.dtype.element_ty), mask=inside)
        tl.store(DV + to, dv.to(DV.dtype.element_ty), mask=inside)


class Numbers(NamedTuple):
    """What the kernels of the backward pass are given besides tensors: see attention.attention."""

    scale: float
    left: int
    right: int
    softcap: float


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    *,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    kernels: ModuleType | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, contiguous, and delta (B, H, S) fp32, which the sinks' gradient needs.

    q, k, v and grad as attention_tiles.described wants them, out, lse and grad_lse contiguous; one query and key at
    least. `kernels` is this module or attention_hopper_backward.
    """
    by: Any = kernels or sys.modules[__name__]
    lse2, delta = terms(grad, grad_lse, out, lse)
    given = (q, k, v, grad, lse2, delta, cu_q, cu_k, Numbers(scale, left, right, softcap))
    return by.queries_gradient(*given), *by.keys_gradient(*given), delta


def terms(
    grad: torch.Tensor, grad_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse2 and delta, (B, H, S) fp32: see attention_delta."""
    B, S, H, D = out.shape
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    attention_delta[(-(-B * S * H // 64),)](
        out, grad, lse, grad_lse, lse2, delta, B * S, S, H, *grad.stride()[:3], D=D, DP=power(D), BM=64, num_warps=4
    )  # fmt: skip
    return lse2, delta


def queries_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    numbers: Numbers,
    blocks: Blocks | None = None,
) -> torch.Tensor:
    """dq; lse2 and delta as of `terms`."""
    (B, S, H, D), (_, N, K, _) = q.shape, k.shape
    scale, left, right, softcap = numbers
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    DP = power(D)
    b = blocks or blocks_for("queries", DP, softcap > 0)
    tiles, number = tiles_of(cu_q, B, S, b.rows)
    attention_backward_queries[(number * H,)](
        *(descriptor(x, n, DP) for x, n in ((q, b.rows), (k, b.keys), (v, b.keys), (grad, b.rows))),
        dq, lse2, delta, *given(lse2, tiles, cu_q, cu_k), 0 if cu_q is None else len(cu_q) - 1, S, N, number,
        -(-S // b.rows), H, left, right, scale, softcap,
        G=H // K, D=D, DP=DP, PACKED=cu_q is not None, LEFT=left >= 0, RIGHT=right >= 0, CAP=softcap > 0,
        BM=b.rows, BN=b.keys, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return dq


def keys_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    numbers: Numbers,
    blocks: Blocks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv; arguments as of queries_gradient."""
    (B, S, H, D), (_, N, K, _) = q.shape, k.shape
    scale, left, right, softcap = numbers
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    DP = power(D)
    b = blocks or blocks_for("keys", DP, softcap > 0)
    if DP == 128 and cu_q is None and left < 0 and right < 0:
        right = S + N  # an idle mask: without one this kernel needs two registers more than there are
    tiles, number = tiles_of(cu_k, B, N, b.keys)
    attention_backward_keys[(number * K,)](
        *(descriptor(x, n, DP) for x, n in ((q, b.rows), (k, b.keys), (v, b.keys), (grad, b.rows))),
        dk, dv, lse2, delta, *given(lse2, tiles, cu_q, cu_k), 0 if cu_q is None else len(cu_q) - 1, S, N, number,
        -(-N // b.keys), H, left, right, scale, softcap,
        G=H // K, D=D, DP=DP, PACKED=cu_q is not None, LEFT=left >= 0, RIGHT=right >= 0, CAP=softcap > 0,
        BM=b.rows, BN=b.keys, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return dk, dv
