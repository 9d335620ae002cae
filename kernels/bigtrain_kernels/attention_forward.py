"""The forward pass of attention in portable Triton: any GPU, TMA on Hopper and newer, the interpreter.

Online softmax in base 2 over blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023,
arXiv:2307.08691). Blocks of keys that every row of the block sees need no mask: they are a loop of their own.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# (a kernel's arguments are typed by Triton when it is compiled)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bigtrain_kernels.attention_blocks import Blocks, blocks_for
from bigtrain_kernels.attention_tiles import descriptor, given, key_range, power, seen, tile, tiles_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(s, scale, softcap):
    """softcap tanh(s scale / softcap), by exp2: the interpreter has no tanh. Large |s| give +-softcap, no NaN."""
    return softcap * (1 - 2 / (1 + tl.exp2(s * (2 * LOG2E * scale / softcap))))


@triton.jit
def _forward_keys(
    acc, total, peak, q, K, V, batch, group, k0, first, last, m, N, shift, left, right, scale, softcap,
    DP: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Blocks of keys [first, last) into the running output, sum of exponentials and maximum."""
    for start in tl.range(first, last, BN):
        k = K.load([batch, group, k0 + start, 0]).reshape(BN, DP)
        s = tl.dot(q, k.T)
        unit = scale * LOG2E
        if CAP:
            s = capped(s, scale, softcap)
            unit = LOG2E
        if MASK:
            n = start + tl.arange(0, BN)
            s = tl.where(seen(m[:, None], n[None, :], N, shift, left, right, LEFT, RIGHT), s, float("-inf"))
        now = tl.maximum(peak, tl.max(s, 1) * unit)
        # A row that has seen no key yet: all exponents are -inf - 0, not -inf - -inf.
        base = tl.where(now == float("-inf"), 0.0, now)
        p = tl.exp2(s * unit - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = V.load([batch, group, k0 + start, 0]).reshape(BN, DP)
        acc = tl.dot(p.to(v.dtype), v, acc)
        peak = now
    return acc, total, peak


@triton.jit(do_not_specialize=["documents", "queries", "keys", "tiles", "blocks", "left", "right"])
def attention_forward(
    Q, K, V, OUT, LSE, SINKS, TILES, CU_Q, CU_K, documents, queries, keys, tiles, blocks, heads, left, right,
    scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    """One block of BM queries of one head.

    The G heads that share keys run side by side, so that the L2 cache serves G - 1 of them; blocks run from the last,
    the longest under a causal mask, so that the short ones fill up the end.
    """
    program = tl.program_id(0)
    index = tiles - 1 - program // G % tiles
    group = program // G // tiles
    head = group * G + program % G
    batch, block, q0, M, k0, N = tile(TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED)
    if block >= 0:
        shift = N - M
        m = block * BM + tl.arange(0, BM)
        q = Q.load([batch, head, q0 + block * BM, 0]).reshape(BM, DP)
        peak = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        if SINK:
            sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
            peak = tl.zeros([BM], tl.float32) + sink
            total += tl.where(sink == float("-inf"), 0.0, 1.0)
        acc = tl.zeros([BM, DP], tl.float32)
        first, whole, until, last = key_range(
            block * BM, tl.minimum(BM, M - block * BM), N, shift, left, right, BN, LEFT, RIGHT
        )
        if LEFT:
            acc, total, peak = _forward_keys(
                acc, total, peak, q, K, V, batch, group, k0, first, tl.minimum(whole, last), m, N, shift, left,
                right, scale, softcap, DP, BN, True, LEFT, RIGHT, CAP,
            )  # fmt: skip
        acc, total, peak = _forward_keys(
            acc, total, peak, q, K, V, batch, group, k0, whole, until, m, N, shift, left,
            right, scale, softcap, DP, BN, False, LEFT, RIGHT, CAP,
        )  # fmt: skip
        acc, total, peak = _forward_keys(
            acc, total, peak, q, K, V, batch, group, k0, tl.maximum(whole, until), last, m, N, shift, left,
            right, scale, softcap, DP, BN, True, LEFT, RIGHT, CAP,
        )  # fmt: skip
        nothing = total == 0
        total = tl.where(nothing, 1.0, total)
        acc = acc / total[:, None]
        lse = tl.where(nothing, float("-inf"), (peak + tl.log2(total)) * LN2)
        d = tl.arange(0, DP)
        rows = tl.cast(batch, tl.int64) * queries + q0 + m
        tl.store(
            OUT + (rows * heads + head)[:, None] * D + d[None, :],
            acc.to(OUT.dtype.element_ty),
            mask=(m[:, None] < M) & (d[None, :] < D),
        )
        tl.store(LSE + (tl.cast(batch, tl.int64) * heads + head) * queries + q0 + m, lse, mask=m < M)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor | None,
    cu_k: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    blocks: Blocks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, S, H, D), k and v (B, N, K, D), as attention_tiles.described wants them -> out like q, lse (B, H, S).

    At least one query and one key.
    """
    (B, S, H, D), (_, N, K, _) = q.shape, k.shape
    out = torch.empty((B, S, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    DP = power(D)
    b = blocks or blocks_for("forward", DP, softcap > 0)
    tiles, number = tiles_of(cu_q, B, S, b.rows)
    attention_forward[(number * H,)](
        descriptor(q, b.rows, DP), descriptor(k, b.keys, DP), descriptor(v, b.keys, DP), out, lse,
        *given(lse, sinks, tiles, cu_q, cu_k), 0 if cu_q is None else len(cu_q) - 1, S, N, number, -(-S // b.rows), H,
        left, right, scale, softcap,
        G=H // K, D=D, DP=DP, BM=b.rows, BN=b.keys, PACKED=cu_q is not None, LEFT=left >= 0, RIGHT=right >= 0,
        CAP=softcap > 0, SINK=sinks is not None, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return out, lse
