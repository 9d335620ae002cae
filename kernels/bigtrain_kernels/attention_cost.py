"""How much work attention is: the pairs of a query and a key that see each other, operations and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def pairs(queries: int, keys: int, left: int = -1, right: int = -1) -> int:
    """Pairs of one sequence: query m stands at position m + keys - queries and sees `left` and `right` of it."""
    position = torch.arange(queries, dtype=torch.int64, device="cpu") + keys - queries
    first = (position - left).clamp(min=0) if left >= 0 else torch.zeros_like(position)
    last = (position + right).clamp(max=keys - 1) if right >= 0 else torch.full_like(position, keys - 1)
    return int((last - first + 1).clamp(min=0).sum())


def pairs_of(q: Any, k: Any, cu_q: Any, cu_k: Any, left: int, right: int) -> int:
    """Pairs of a call of the operator. Packed lengths that are not known, as with fake tensors: one document."""
    with torch.utils._python_dispatch._disable_current_modes():
        if cu_q is None or type(cu_q) is not torch.Tensor or cu_q.is_meta:
            return int(q.shape[0]) * pairs(int(q.shape[1]), int(k.shape[1]), left, right)
        lengths = zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)
        return sum(pairs(m, n, left, right) for m, n in lengths)


def attention_bytes(q: Sequence[int], k: Sequence[int], size: int = 2, *, backward: bool = False) -> int:
    """Bytes read and written at least once: q (B, S, H, D), k (B, N, K, D), elements of `size` bytes.

    Forward: q, k, v in, out and lse out. Backward: q, k, v, out, its gradient and lse in, three gradients out.
    """
    B, S, H, D = q
    queries, keys = B * S * H * D * size, B * k[1] * k[2] * D * size
    rows = 4 * B * S * H
    return 4 * queries + 4 * keys + rows if backward else 2 * queries + 2 * keys + rows
