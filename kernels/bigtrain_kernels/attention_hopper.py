"""The forward pass of attention for Hopper in Gluon: one warp loads, two groups of four warps compute 64 rows each.

While a group's tensor cores multiply q by the next keys, and the weights by the last values, its other units compute
the exponentials between them; the two groups drift apart and fill each other's gaps (Shah et al. 2024,
arXiv:2407.08608, section 3). Keys are taken from the last block to the first: those that need a causal mask come first.

Blocks, documents, windows and results are those of attention_forward.py, which computes the same. Needs sm_90, heads of
64 or 128, no softcap. Offline for sm_90: 168 registers at the start, 0 spilled (tests/kernels/gate_attention.py).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# (a kernel's arguments are typed by Triton when it is compiled)

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bigtrain_kernels.attention_hopper_tiles import (
    LN2,
    LOG2E,
    descriptor,
    key_blocks,
    load_tile,
    rows_of,
    store_rows,
    sync,
    tile,
)
from bigtrain_kernels.attention_tiles import given, tiles_of

ROWS = 64
"""Rows of a group: what one wgmma multiplies. A program has two groups."""


@gluon.jit
def _producer(
    Q, K, V, qs, ks, vs, q_full, k_full, k_empty, v_full, v_empty, batch, head, group, row, k0, first, end,
    BYTES_Q: gl.constexpr, BYTES_K: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both groups' rows, then keys and values from the last block to the first, as fast as buffers become free."""
    mbarrier.expect(q_full, 2 * BYTES_Q)
    load_tile(Q, [batch, head, row, 0], q_full, qs.index(0))
    load_tile(Q, [batch, head, row + 64, 0], q_full, qs.index(1))
    for i in range(end - first):
        stage = i % STAGES
        turn = (i // STAGES) & 1
        at = k0 + (end - 1 - i) * BN
        mbarrier.wait(k_empty.index(stage), turn ^ 1)
        mbarrier.expect(k_full.index(stage), BYTES_K)
        load_tile(K, [batch, group, at, 0], k_full.index(stage), ks.index(stage))
        mbarrier.wait(v_empty.index(stage), turn ^ 1)
        mbarrier.expect(v_full.index(stage), BYTES_K)
        load_tile(V, [batch, group, at, 0], v_full.index(stage), vs.index(stage))


@gluon.jit
def _softmax(
    s, peak, total, m, n, N, low, high, unit, MASK: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):  # fmt: skip
    """Weights of a block, what shrinks the earlier ones, and the new maximum and sum. Row m sees keys
    m + low to m + high.
    """
    if MASK:
        seen = (n < N)[None, :]
        if RIGHT:
            seen = seen & (n[None, :] <= (m + high)[:, None])
        if LEFT:
            seen = seen & (n[None, :] >= (m + low)[:, None])
        s = gl.where(seen, s, float("-inf"))
    now = gl.maximum(peak, gl.max(s, 1) * unit)
    base = gl.where(now == float("-inf"), 0.0, now)
    p = gl.exp2(s * unit - base[:, None])
    shrink = gl.exp2(peak - base)
    return p, shrink, now, total * shrink + gl.sum(p, 1)


@gluon.jit
def _steps(
    acc, weights, peak, total, begin, stop, q, ks, vs, k_full, k_empty, v_full, v_empty, m, columns, end, N, low,
    high, unit, ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, scores: gl.constexpr, operand: gl.constexpr, outputs: gl.constexpr,
):  # fmt: skip
    """Blocks number `begin` to `stop`, counted from the last: scores of each, and the values of the one before."""
    for i in range(begin, stop):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        s = warpgroup_mma(
            q, rows_of(ks.index(stage)).permute((1, 0)), gl.zeros([ROWS, BN], gl.float32, scores),
            use_acc=False, is_async=True,
        )  # fmt: skip
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc = warpgroup_mma(weights, rows_of(vs.index(before)), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        sync()
        mbarrier.arrive(k_empty.index(stage), count=1)
        n = (end - 1 - i) * BN + columns
        p, shrink, peak, total = _softmax(s, peak, total, m, n, N, low, high, unit, MASK, LEFT, RIGHT)
        acc = warpgroup_mma_wait(0, deps=[acc])
        sync()
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, outputs))[:, None]
        weights = gl.convert_layout(p.to(weights.dtype), operand)
    return acc, weights, peak, total


@gluon.jit
def _consumer(
    number: gl.constexpr, qs, ks, vs, q_full, k_full, k_empty, v_full, v_empty, OUT, LSE, SINKS, batch, head, heads,
    queries, q0, m0, M, N, left, right, scale, first, whole, until, end,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SINK: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of 64 rows."""
    ROWS: gl.constexpr = 64
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=outputs, k_width=2)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    low, high = N - M - left, N - M + right
    m = m0 + number * ROWS + gl.arange(0, ROWS, by_row)
    columns = gl.arange(0, BN, gl.SliceLayout(0, scores))
    unit = scale * LOG2E
    peak = gl.full([ROWS], float("-inf"), gl.float32, by_row)
    total = gl.full([ROWS], 0.0, gl.float32, by_row)
    if SINK:
        sink = gl.load(SINKS + head).to(gl.float32) * LOG2E
        peak = gl.full([ROWS], 0.0, gl.float32, by_row) + sink
        total = total + gl.where(sink == float("-inf"), 0.0, 1.0)
    acc = gl.zeros([ROWS, D], gl.float32, outputs)
    mbarrier.wait(q_full, 0)
    q = rows_of(qs.index(number))
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(
        q, rows_of(ks.index(0)).permute((1, 0)), gl.zeros([ROWS, BN], gl.float32, scores), use_acc=False,
        is_async=True,
    )  # fmt: skip
    s = warpgroup_mma_wait(0, deps=[s])
    sync()
    mbarrier.arrive(k_empty.index(0), count=1)
    n = (end - 1) * BN + columns
    p, _, peak, total = _softmax(s, peak, total, m, n, N, low, high, unit, True, LEFT, RIGHT)
    weights = gl.convert_layout(p.to(qs.dtype), operand)
    # Blocks by their number from the last: [1, masked) at the end, [masked, clear) unmasked, [clear, count) a window's.
    count = end - first
    masked = gl.minimum(count, gl.maximum(1, end - until))
    acc, weights, peak, total = _steps(
        acc, weights, peak, total, 1, masked, q, ks, vs, k_full, k_empty, v_full, v_empty, m, columns, end, N,
        low, high, unit, ROWS, BN, STAGES, True, LEFT, RIGHT, scores, operand, outputs,
    )  # fmt: skip
    clear = count
    if LEFT:
        clear = gl.minimum(count, gl.maximum(masked, end - whole))
    acc, weights, peak, total = _steps(
        acc, weights, peak, total, masked, clear, q, ks, vs, k_full, k_empty, v_full, v_empty, m, columns, end, N,
        low, high, unit, ROWS, BN, STAGES, False, LEFT, RIGHT, scores, operand, outputs,
    )  # fmt: skip
    if LEFT:
        acc, weights, peak, total = _steps(
            acc, weights, peak, total, clear, count, q, ks, vs, k_full, k_empty, v_full, v_empty, m, columns, end,
            N, low, high, unit, ROWS, BN, STAGES, True, LEFT, RIGHT, scores, operand, outputs,
        )  # fmt: skip
    stage = (count - 1) % STAGES
    mbarrier.wait(v_full.index(stage), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(weights, rows_of(vs.index(stage)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _store(
        acc, peak, total, OUT, LSE, batch, head, heads, queries, q0, m0 + number * ROWS, M, ROWS, D, outputs
    )


@gluon.jit
def _store(
    acc, peak, total, OUT, LSE, batch, head, heads, queries, q0, m0, M, ROWS: gl.constexpr, D: gl.constexpr,
    outputs: gl.constexpr,
):  # fmt: skip
    """Output, divided by its sum of exponentials, and log-sum-exp."""
    nothing = total == 0
    total = gl.where(nothing, 1.0, total)
    lse = gl.where(nothing, float("-inf"), (peak + gl.log2(total)) * LN2)
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, outputs))[:, None]
    row = batch.to(gl.int64) * queries + q0 + m0
    store_rows(acc, OUT, row, M - m0, heads, head, ROWS, D)
    m = m0 + gl.arange(0, ROWS, lse.type.layout)
    gl.store(LSE + (batch.to(gl.int64) * heads + head) * queries + q0 + m, lse, mask=m < M)


@gluon.jit(do_not_specialize=["documents", "queries", "keys", "tiles", "blocks", "left", "right"])
def attention_forward_hopper(
    Q, K, V, OUT, LSE, SINKS, TILES, CU_Q, CU_K, documents, queries, keys, tiles, blocks, heads, left, right, scale,
    G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, SINK: gl.constexpr,
):  # fmt: skip
    """One block of 128 queries of one head, in the order of attention_forward.attention_forward."""
    ROWS: gl.constexpr = 64
    qs = gl.allocate_shared_memory(Q.dtype, [2, 1, 1, ROWS, D], Q.layout)
    ks = gl.allocate_shared_memory(K.dtype, [STAGES, 1, 1, BN, D], K.layout)
    vs = gl.allocate_shared_memory(V.dtype, [STAGES, 1, 1, BN, D], V.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both groups have read it
        mbarrier.init(v_empty.index(i), count=2)
    program = gl.program_id(0)
    index = tiles - 1 - program // G % tiles
    group = program // G // tiles
    head = group * G + program % G
    batch, block, q0, M, k0, N = tile(TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED)
    m0 = block * 2 * ROWS
    rows = gl.minimum(2 * ROWS, M - m0)
    first, whole, until, end = key_blocks(m0, rows, N, N - M, left, right, BN, LEFT, RIGHT)
    bytes_q: gl.constexpr = ROWS * D * 2
    bytes_k: gl.constexpr = BN * D * 2
    gl.warp_specialize(
        [
            (_consumer, (
                0, qs, ks, vs, q_full, k_full, k_empty, v_full, v_empty, OUT, LSE, SINKS, batch, head, heads, queries,
                q0, m0, M, N, left, right, scale, first, whole, until, end, D, BN, STAGES, LEFT, RIGHT, SINK,
            )),
            (_consumer, (
                1, qs, ks, vs, q_full, k_full, k_empty, v_full, v_empty, OUT, LSE, SINKS, batch, head, heads, queries,
                q0, m0, M, N, left, right, scale, first, whole, until, end, D, BN, STAGES, LEFT, RIGHT, SINK,
            )),
            (_producer, (
                Q, K, V, qs, ks, vs, q_full, k_full, k_empty, v_full, v_empty, batch, head, group, q0 + m0, k0, first,
                end, bytes_q, bytes_k, BN, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As attention_forward.forward, for calls that attention_path.choose allows."""
    (B, S, H, D), (_, N, K, _) = q.shape, k.shape
    out = torch.empty((B, S, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    # A window of D 64 with 128 keys spills 8 bytes in Triton 3.9.
    keys, stages = (64 if D == 64 and left >= 0 else 128), {64: 3, 128: 2}[D]
    tiles, number = tiles_of(cu_q, B, S, 2 * ROWS)
    attention_forward_hopper[(number * H,)](
        descriptor(q, ROWS), descriptor(k, keys), descriptor(v, keys), out, lse,
        *given(lse, sinks, tiles, cu_q, cu_k), 0 if cu_q is None else len(cu_q) - 1, S, N, number,
        -(-S // (2 * ROWS)), H, left, right, scale,
        G=H // K, D=D, BN=keys, STAGES=stages, PACKED=cu_q is not None, LEFT=left >= 0, RIGHT=right >= 0,
        SINK=sinks is not None, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out, lse
