"""Which document and block each program works on, and how blocks of rows and keys meet.

Packed documents get a flat list of blocks, made on the device by one small kernel: no program without work, no wait for
the lengths. Document i holds rows cu[i] to cu[i + 1]; what follows the last document counts as one more, normally
empty, so every row of an output is written. Offsets are clamped to the tensor: a wrong cu_seqlens gives wrong numbers,
never a bad access.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# (a kernel's arguments are typed by Triton when it is compiled)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def span(CU, document, documents, total, AGAIN: tl.constexpr = False):
    """First row and number of rows of a document, within [0, total). `AGAIN` keeps the compiler from reusing others."""
    first = tl.load(CU + document, mask=document > 0, other=0, volatile=AGAIN)
    last = tl.load(CU + document + 1, mask=document < documents, other=total, volatile=AGAIN)
    first = tl.minimum(tl.maximum(first, 0), total)
    return first, tl.minimum(tl.maximum(last, first), total) - first


@triton.jit(do_not_specialize=["documents", "total", "capacity"])
def list_tiles(CU, TILES, documents, total, capacity, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Program i writes (i, block) for each block of document i behind those before it, into TILES (capacity, 2) int32.

    The last program also marks what is left with document -1.
    """
    document = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    before = 0
    for start in tl.range(0, document, WIDTH):
        each = start + i
        first = tl.load(CU + each, mask=(each < document) & (each > 0), other=0)
        last = tl.load(CU + each + 1, mask=each < document, other=0)
        first = tl.minimum(tl.maximum(first, 0), total)
        last = tl.minimum(tl.maximum(last, first), total)
        rows = tl.where(each < document, last - first, 0)
        before += tl.sum((rows + BLOCK - 1) // BLOCK)
    _, rows = span(CU, document, documents, total)
    blocks = (rows + BLOCK - 1) // BLOCK
    end = before + blocks
    if document == documents:
        end = capacity
    for start in tl.range(before, end, WIDTH):
        each = start + i
        mine = tl.where(each - before < blocks, document, -1)
        inside = (each < end) & (each < capacity)
        tl.store(TILES + 2 * each, mine, mask=inside)
        tl.store(TILES + 2 * each + 1, each - before, mask=inside)


@triton.jit
def tile(
    TILES, CU_Q, CU_K, index, documents, queries, keys, blocks, PACKED: tl.constexpr, AGAIN: tl.constexpr = False
):  # fmt: skip
    """(batch row, block, first query, queries, first key, keys) of program `index`; block -1 when there is no work.

    Packed: from the list. Otherwise batch rows of `blocks` blocks each.
    """
    if PACKED:
        document = tl.load(TILES + 2 * index, volatile=AGAIN)
        block = tl.load(TILES + 2 * index + 1, volatile=AGAIN)
        block = tl.where(document < 0, -1, block)
        document = tl.maximum(document, 0)
        q0, M = span(CU_Q, document, documents, queries, AGAIN)
        k0, N = span(CU_K, document, documents, keys, AGAIN)
        batch = 0
    else:
        batch = index // blocks
        block = index % blocks
        q0, M, k0, N = 0, queries, 0, keys
    return batch, block, q0, M, k0, N


@triton.jit
def seen(m, n, N, shift, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether row m sees key n (of shapes that broadcast): `left` keys before position m + shift, `right` after it."""
    inside = n < N
    if RIGHT:
        inside = inside & (n <= m + (shift + right))
    if LEFT:
        inside = inside & (n >= m + (shift - left))
    return inside


@triton.jit
def key_range(
    m0, rows, N, shift, left, right, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):  # fmt: skip
    """For rows [m0, m0 + rows): keys seen by any are in [first, last), by all in [whole, until).

    All but `last` are multiples of BN. Blocks in [first, whole) and [max(whole, until), last) need a mask.
    """
    first, whole, last = 0, 0, N
    until = N // BN * BN
    if LEFT:
        first = tl.maximum(0, m0 + shift - left) // BN * BN
        whole = (tl.maximum(0, m0 + rows - 1 + shift - left) + BN - 1) // BN * BN
    if RIGHT:
        last = tl.maximum(0, tl.minimum(N, m0 + rows + shift + right))
        until = tl.maximum(0, tl.minimum(N, m0 + shift + right + 1)) // BN * BN
    return first, whole, until, last


@triton.jit
def query_range(
    n0, columns, M, shift, left, right, BM: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):  # fmt: skip
    """Rows that see any of keys [n0, n0 + columns): [first, last), first a multiple of BM."""
    first, last = 0, M
    if RIGHT:
        first = tl.maximum(0, n0 - shift - right) // BM * BM
    if LEFT:
        last = tl.maximum(0, tl.minimum(M, n0 + columns - shift + left))
    return first, last


def tiles_of(cu: torch.Tensor | None, batch: int, rows: int, block: int) -> tuple[torch.Tensor | None, int]:
    """The list of blocks of `block` rows and its length; without cu_seqlens `batch` times `rows` rows, and no list."""
    if cu is None:
        return None, batch * -(-rows // block)
    documents = len(cu) - 1
    capacity = (
        rows // block + documents + 1
    )  # sum of ceil(length / block) over documents and the rows after them
    tiles = torch.empty((capacity, 2), dtype=torch.int32, device=cu.device)
    list_tiles[(documents + 1,)](cu, tiles, documents, rows, capacity, BLOCK=block, WIDTH=1024, num_warps=4)
    return tiles, capacity


def given(other: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """The tensors, `other` in place of those that there are not: a kernel takes a pointer and leaves it alone."""
    return [other if x is None else x for x in tensors]


def described(x: torch.Tensor) -> torch.Tensor:
    """x (B, S, H, D), or a copy, with strides that TMA takes: D by 1, others by multiples of 16 bytes, none by 0."""
    unit = 16 // x.element_size()
    right = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        right = right and stride % unit == 0 and (stride > 0 or size == 1)
    if right:
        return x
    *outer, D = x.shape
    copy = x.new_empty((*outer, -(-D // unit) * unit))[..., :D]
    return copy.copy_(x)


def descriptor(x: torch.Tensor, rows: int, dim: int) -> Any:
    """Blocks (1, 1, rows, dim) of x (B, S, H, D) by (batch, head, row, 0); zeros come from outside of S and D."""
    B, S, H, D = x.shape
    b, s, h, _ = (stride if size > 1 else 16 for size, stride in zip(x.shape, x.stride(), strict=True))
    return TensorDescriptor(x, [B, H, S, D], [b, h, s, 1], [1, 1, rows, dim])


def power(dim: int) -> int:
    """The block's head dim: a power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())
