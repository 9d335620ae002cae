"""The backward pass of attention for Hopper in Gluon: one warp loads, two groups of four warps compute 64 rows each.

Formulas, blocks and results are those of attention_backward.py: two kernels, seven products, the same bits every time.
Scores, and what the gradient of the weights is made of, stay in registers and are the left operand of the next
product, as FlashAttention-3's forward pass does with the weights (Shah et al. 2024, arXiv:2407.08608). The products
that end a block run while those of the next one's scores begin, and a group computes exponentials beside them.

Needs what attention_hopper.py needs. Offline for sm_90: tests/kernels/gate_attention.py; run by hopper_machine.py.
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

from bigtrain_kernels.attention_backward import Numbers
from bigtrain_kernels.attention_hopper_tiles import (
    LOG2E,
    descriptor,
    key_blocks,
    load_tile,
    query_range,
    rows_of,
    store_rows,
    sync,
    tile,
)
from bigtrain_kernels.attention_tiles import given, tiles_of

ROWS = 64
"""Rows or keys of a group. A program has two groups."""


@gluon.jit
def _load_keys(
    Q, K, V, GRAD, qs, gs, ks, vs, q_full, k_full, k_empty, batch, head, group, row, k0, first, end,
    BYTES_Q: gl.constexpr, BYTES_K: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both groups' rows of q and of the gradient, then keys and values, as fast as buffers become free."""
    mbarrier.expect(q_full, 4 * BYTES_Q)
    for i in gl.static_range(2):
        load_tile(Q, [batch, head, row + 64 * i, 0], q_full, qs.index(i))
        load_tile(GRAD, [batch, head, row + 64 * i, 0], q_full, gs.index(i))
    for i in range(end - first):
        stage = i % STAGES
        mbarrier.wait(k_empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(stage), 2 * BYTES_K)
        load_tile(K, [batch, group, k0 + (first + i) * BN, 0], k_full.index(stage), ks.index(stage))
        load_tile(V, [batch, group, k0 + (first + i) * BN, 0], k_full.index(stage), vs.index(stage))


@gluon.jit
def _queries(
    number: gl.constexpr, qs, gs, ks, vs, q_full, k_full, k_empty, DQ, LSE2, DELTA, batch, head, heads, queries, q0,
    m0, M, N, left, right, scale, first, whole, until, end,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Gradient of 64 queries."""
    ROWS: gl.constexpr = 64
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=outputs, k_width=2)
    m = m0 + number * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    columns = gl.arange(0, BN, gl.SliceLayout(0, scores))
    low, high = N - M - left, N - M + right
    at = (batch.to(gl.int64) * heads + head) * queries + q0
    lse = gl.load(LSE2 + at + m, mask=m < M, other=float("inf"))
    delta = gl.load(DELTA + at + m, mask=m < M, other=0.0)
    unit = scale * LOG2E
    mbarrier.wait(q_full, 0)
    q = rows_of(qs.index(number))
    grad = rows_of(gs.index(number))
    dq = gl.zeros([ROWS, D], gl.float32, outputs)
    ds = gl.zeros([ROWS, BN], ks.dtype, operand)
    nothing = gl.zeros([ROWS, BN], gl.float32, scores)
    for i in range(end - first):
        stage = i % STAGES
        before = gl.maximum(i - 1, 0) % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        s = warpgroup_mma(q, rows_of(ks.index(stage)).permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma(
            grad, rows_of(vs.index(stage)).permute((1, 0)), nothing - delta[:, None], is_async=True
        )
        dq = warpgroup_mma(ds, rows_of(ks.index(before)), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=[s])
        p = gl.exp2(s * unit - lse[:, None])
        block = first + i
        if (block < whole) | (block >= until):
            n = block * BN + columns
            seen = (n < N)[None, :]
            if RIGHT:
                seen = seen & (n[None, :] <= (m + high)[:, None])
            if LEFT:
                seen = seen & (n[None, :] >= (m + low)[:, None])
            p = gl.where(seen, p, 0.0)
        dp = warpgroup_mma_wait(1, deps=[dp])
        dp = p * dp
        dq = warpgroup_mma_wait(0, deps=[dq])
        if i > 0:
            sync()
            mbarrier.arrive(k_empty.index(before), count=1)
        ds = gl.convert_layout(dp.to(ks.dtype), operand)
    dq = warpgroup_mma(ds, rows_of(ks.index((end - first - 1) % STAGES)), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    row = batch.to(gl.int64) * queries + q0 + m0 + number * ROWS
    store_rows(dq * scale, DQ, row, M - m0 - number * ROWS, heads, head, ROWS, D)


@gluon.jit(do_not_specialize=["documents", "queries", "keys", "tiles", "blocks", "left", "right"])
def attention_backward_queries_hopper(
    Q, K, V, GRAD, DQ, LSE2, DELTA, TILES, CU_Q, CU_K, documents, queries, keys, tiles, blocks, heads, left, right,
    scale,
    G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Gradient of a block of 128 queries of one head; programs in the order of the forward pass."""
    ROWS: gl.constexpr = 64
    qs = gl.allocate_shared_memory(Q.dtype, [2, 1, 1, ROWS, D], Q.layout)
    gs = gl.allocate_shared_memory(Q.dtype, [2, 1, 1, ROWS, D], GRAD.layout)
    ks = gl.allocate_shared_memory(K.dtype, [STAGES, 1, 1, BN, D], K.layout)
    vs = gl.allocate_shared_memory(V.dtype, [STAGES, 1, 1, BN, D], V.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both groups have read it
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
            (_queries, (
                0, qs, gs, ks, vs, q_full, k_full, k_empty, DQ, LSE2, DELTA, batch, head, heads, queries, q0, m0, M, N,
                left, right, scale, first, whole, until, end, D, BN, STAGES, LEFT, RIGHT,
            )),
            (_queries, (
                1, qs, gs, ks, vs, q_full, k_full, k_empty, DQ, LSE2, DELTA, batch, head, heads, queries, q0, m0, M, N,
                left, right, scale, first, whole, until, end, D, BN, STAGES, LEFT, RIGHT,
            )),
            (_load_keys, (
                Q, K, V, GRAD, qs, gs, ks, vs, q_full, k_full, k_empty, batch, head, group, q0 + m0, k0, first, end,
                bytes_q, bytes_k, BN, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _load_queries(
    Q, K, V, GRAD, LSE2, DELTA, ks, vs, qs, gs, lses, deltas, k_full, q_full, q_empty, batch, group, heads, queries,
    q0, M, key, first, steps,
    G: gl.constexpr, BM: gl.constexpr, BYTES_Q: gl.constexpr, BYTES_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both groups' keys and values, then blocks of queries, their gradients, lse and delta, head after head."""
    terms: gl.constexpr = gl.BlockedLayout([BM // 32], [32], [1], [0])
    mbarrier.expect(k_full, 4 * BYTES_K)
    for i in gl.static_range(2):
        load_tile(K, [batch, group, key + 64 * i, 0], k_full, ks.index(i))
        load_tile(V, [batch, group, key + 64 * i, 0], k_full, vs.index(i))
    for i in range(steps * G):
        stage = i % STAGES
        head = group * G + i // steps
        m0 = first + i % steps * BM
        m = m0 + gl.arange(0, BM, terms)
        at = (batch.to(gl.int64) * heads + head) * queries + q0
        lse = gl.load(LSE2 + at + m, mask=m < M, other=float("inf"))
        delta = gl.load(DELTA + at + m, mask=m < M, other=0.0)
        mbarrier.wait(q_empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(q_full.index(stage), 2 * BYTES_Q)
        load_tile(Q, [batch, head, q0 + m0, 0], q_full.index(stage), qs.index(stage))
        load_tile(GRAD, [batch, head, q0 + m0, 0], q_full.index(stage), gs.index(stage))
        lses.index(stage).store(lse)
        deltas.index(stage).store(delta)
        sync()
        mbarrier.arrive(q_full.index(stage), count=1)


@gluon.jit
def _keys(
    number: gl.constexpr, ks, vs, qs, gs, lses, deltas, k_full, q_full, q_empty, DK, DV, row, count, tiles, heads, low,
    high, scale, first, steps,
    G: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr,
):  # fmt: skip
    """Gradients of 64 keys and values: scores are (keys, queries) here. Queries past the end have lse inf, so p 0."""
    ROWS: gl.constexpr = 64
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=outputs, k_width=2)
    by_query: gl.constexpr = gl.SliceLayout(0, scores)
    # Key i of the group sees query m0 + j when low <= i - j - m0 <= high.
    low -= number * ROWS
    high -= number * ROWS
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    columns = gl.arange(0, BM, by_query)
    unit = scale * LOG2E
    mbarrier.wait(k_full, 0)
    k = rows_of(ks.index(number))
    v = rows_of(vs.index(number))
    dk = gl.zeros([ROWS, D], gl.float32, outputs)
    dv = gl.zeros([ROWS, D], gl.float32, outputs)
    nothing = gl.zeros([ROWS, BM], gl.float32, scores)
    for i in range(steps * G):
        stage = i % STAGES
        m0 = first + i % steps * BM
        mbarrier.wait(q_full.index(stage), (i // STAGES) & 1)
        q = rows_of(qs.index(stage))
        grad = rows_of(gs.index(stage))
        s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = nothing - deltas.index(stage).load(by_query)[None, :]
        dp = warpgroup_mma(v, grad.permute((1, 0)), dp, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * unit - lses.index(stage).load(by_query)[None, :])
        if RIGHT:
            p = gl.where(rows[:, None] <= (columns + (m0 + high))[None, :], p, 0.0)
        if LEFT:
            p = gl.where((rows - (m0 + low))[:, None] >= columns[None, :], p, 0.0)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = p * dp
        dv = warpgroup_mma(gl.convert_layout(p.to(ks.dtype), operand), grad, dv, is_async=True)
        dk = warpgroup_mma(gl.convert_layout(ds.to(ks.dtype), operand), q, dk, is_async=True)
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        sync()
        mbarrier.arrive(q_empty.index(stage), count=1)
    group = gl.program_id(0) // tiles
    groups = heads // G
    row = row.to(gl.int64) + number * ROWS
    count -= number * ROWS
    store_rows(dk * scale, DK, row, count, groups, group, ROWS, D)
    store_rows(dv, DV, row, count, groups, group, ROWS, D)


@gluon.jit(do_not_specialize=["documents", "queries", "keys", "tiles", "blocks", "left", "right"])
def attention_backward_keys_hopper(
    Q, K, V, GRAD, DK, DV, LSE2, DELTA, TILES, CU_Q, CU_K, documents, queries, keys, tiles, blocks, heads, left,
    right, scale,
    G: gl.constexpr, D: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr,
):  # fmt: skip
    """Gradients of a block of 128 keys and values of one key head, from its G query heads one after another."""
    ROWS: gl.constexpr = 64
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ks = gl.allocate_shared_memory(K.dtype, [2, 1, 1, ROWS, D], K.layout)
    vs = gl.allocate_shared_memory(V.dtype, [2, 1, 1, ROWS, D], V.layout)
    qs = gl.allocate_shared_memory(Q.dtype, [STAGES, 1, 1, BM, D], Q.layout)
    gs = gl.allocate_shared_memory(Q.dtype, [STAGES, 1, 1, BM, D], GRAD.layout)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES, BM], plain)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BM], plain)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)  # the loads, and the terms that threads write
        mbarrier.init(q_empty.index(i), count=2)  # both groups have read it
    index = gl.program_id(0) % tiles
    group = gl.program_id(0) // tiles
    batch, block, q0, M, k0, N = tile(TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED)
    n0 = block * 2 * ROWS
    columns = gl.minimum(2 * ROWS, N - n0)
    first, last = query_range(n0, columns, M, N - M, left, right, BM, LEFT, RIGHT)
    steps = gl.maximum(0, last - first + BM - 1) // BM
    bytes_q: gl.constexpr = BM * D * 2
    bytes_k: gl.constexpr = ROWS * D * 2
    gl.warp_specialize(
        [
            (_keys, (
                0, ks, vs, qs, gs, lses, deltas, k_full, q_full, q_empty, DK, DV, batch * keys + k0 + n0, N - n0, tiles,
                heads, N - M - left - n0, N - M + right - n0, scale, first, steps, G, D, BM, STAGES, LEFT, RIGHT,
            )),
            (_keys, (
                1, ks, vs, qs, gs, lses, deltas, k_full, q_full, q_empty, DK, DV, batch * keys + k0 + n0, N - n0, tiles,
                heads, N - M - left - n0, N - M + right - n0, scale, first, steps, G, D, BM, STAGES, LEFT, RIGHT,
            )),
            (_load_queries, (
                Q, K, V, GRAD, LSE2, DELTA, ks, vs, qs, gs, lses, deltas, k_full, q_full, q_empty, batch, group, heads,
                queries, q0, M, k0 + n0, first, steps, G, BM, bytes_q, bytes_k, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


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
) -> torch.Tensor:
    """As attention_backward.queries_gradient, for calls that attention_path.choose allows."""
    (B, S, H, D), (_, N, K, _) = q.shape, k.shape
    scale, left, right, _ = numbers
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    keys, stages = {64: (128, 3), 128: (64, 3)}[D]
    tiles, number = tiles_of(cu_q, B, S, 2 * ROWS)
    attention_backward_queries_hopper[(number * H,)](
        descriptor(q, ROWS), descriptor(k, keys), descriptor(v, keys), descriptor(grad, ROWS), dq, lse2, delta,
        *given(lse2, tiles, cu_q, cu_k), 0 if cu_q is None else len(cu_q) - 1, S, N, number, -(-S // (2 * ROWS)), H,
        left, right, scale,
        G=H // K, D=D, BN=keys, STAGES=stages, PACKED=cu_q is not None, LEFT=left >= 0, RIGHT=right >= 0, num_warps=4,
        maxnreg=168,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """As attention_backward.keys_gradient, for calls that attention_path.choose allows."""
    (B, S, H, D), (_, N, K, _) = q.shape, k.shape
    scale, left, right, _ = numbers
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    rows, stages = {64: (128, 2), 128: (64, 2)}[D]
    tiles, number = tiles_of(cu_k, B, N, 2 * ROWS)
    attention_backward_keys_hopper[(number * K,)](
        descriptor(q, rows), descriptor(k, ROWS), descriptor(v, ROWS), descriptor(grad, rows), dk, dv, lse2, delta,
        *given(lse2, tiles, cu_q, cu_k), 0 if cu_q is None else len(cu_q) - 1, S, N, number, -(-N // (2 * ROWS)), H,
        left, right, scale,
        G=H // K, D=D, BM=rows, STAGES=stages, PACKED=cu_q is not None, LEFT=left >= 0, RIGHT=right >= 0, num_warps=4,
        maxnreg=168,
    )  # fmt: skip
    return dk, dv
