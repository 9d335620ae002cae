"""What the Gluon kernels of attention share: functions of attention_tiles.py in that language, and layouts."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# (a kernel's arguments are typed by Triton when it is compiled)

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)

# Names that Triton 3.9 changed.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
sync = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def span(CU, document, documents, total):
    """See attention_tiles.span."""
    first = gl.load(CU + gl.minimum(document, documents))
    first = gl.where(document > 0, first, 0)
    last = gl.load(CU + gl.minimum(document + 1, documents))
    last = gl.where(document < documents, last, total)
    first = gl.minimum(gl.maximum(first, 0), total)
    return first, gl.minimum(gl.maximum(last, first), total) - first


@gluon.jit
def tile(TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED: gl.constexpr):
    """See attention_tiles.tile; a program without work gets a document without rows."""
    if PACKED:
        document = gl.load(TILES + 2 * index)
        block = gl.load(TILES + 2 * index + 1)
        q0, M = span(CU_Q, gl.maximum(document, 0), documents, queries)
        k0, N = span(CU_K, gl.maximum(document, 0), documents, keys)
        batch = 0
        M = gl.where(document < 0, 0, M)
        N = gl.where(document < 0, 0, N)
        block = gl.where(document < 0, 0, block)
    else:
        batch = index // blocks
        block = index % blocks
        q0 = 0
        M = queries
        k0 = 0
        N = keys
    return batch, block, q0, M, k0, N


@gluon.jit
def rows_of(block):
    """(1, 1, rows, D) in shared memory as (rows, D)."""
    return block.reshape((block.shape[2], block.shape[3]))


@gluon.jit
def key_blocks(m0, rows, N, shift, left, right, BN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """Numbers of blocks of keys: see attention_tiles.key_range. Seen by any row [first, end), by all [whole, until).

    One at least, all masked, so that there is always one to begin with.
    """
    first = 0
    whole = 0
    last = N
    until = N // BN
    if LEFT:
        first = gl.maximum(0, m0 + shift - left) // BN
        whole = (gl.maximum(0, m0 + rows - 1 + shift - left) + BN - 1) // BN
    if RIGHT:
        last = gl.maximum(0, gl.minimum(N, m0 + rows + shift + right))
        until = gl.maximum(0, gl.minimum(N, m0 + shift + right + 1)) // BN
    end = gl.maximum((last + BN - 1) // BN, first + 1)
    return first, whole, until, end


@gluon.jit
def query_range(
    n0, columns, M, shift, left, right, BM: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):  # fmt: skip
    """See attention_tiles.query_range."""
    first = 0
    last = M
    if RIGHT:
        first = gl.maximum(0, n0 - shift - right) // BM * BM
    if LEFT:
        last = gl.maximum(0, gl.minimum(M, n0 + columns - shift + left))
    return first, last


@gluon.jit
def store_rows(x, OUT, row, count, heads, head, ROWS: gl.constexpr, D: gl.constexpr):
    """x (ROWS, D) of one head to `count` rows of OUT (rows, heads, D) from `row`: by 16 bytes a thread, which the
    layout of the products would not allow.
    """
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    out = gl.convert_layout(x.to(OUT.dtype.element_ty), wide)
    m = gl.arange(0, ROWS, gl.SliceLayout(1, wide))
    d = gl.arange(0, D, gl.SliceLayout(0, wide))
    gl.store(OUT + ((row + m) * heads + head)[:, None] * D + d[None, :], out, mask=(m < count)[:, None])


def descriptor(x: torch.Tensor, rows: int) -> Any:
    """See attention_tiles.descriptor."""
    B, S, H, D = x.shape
    b, s, h, _ = (stride if size > 1 else 16 for size, stride in zip(x.shape, x.stride(), strict=True))
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    shape = [1, 1, rows, D]
    layout = gl.NVMMASharedLayout.get_default_for(shape, kind)
    return TensorDescriptor(x, [B, H, S, D], [b, h, s, 1], shape, layout)
