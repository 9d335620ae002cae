"""How often DeepSpeed's ZeRO 2 and 3 communicate in a microbatch: messages cost latency, on many ranks more than bytes.

Gradients go out in buckets, whenever the next would not fit. Level 3's coordinator
(deepspeed.runtime.zero.partitioned_param_coordinator) gathers a block that is entered, and then also
`stage3_prefetch_bucket_size` elements or more of what comes next, while it holds fewer than
`stage3_max_live_parameters`. These functions do the same with sizes alone; tests/test_plan_messages.py compares them
with the calls of executed code.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator

from bigtrain.config import ModelConfig
from bigtrain.plan.states import Limits, zero_limits


@functools.lru_cache(maxsize=1024)
def level_3(model: ModelConfig, tensor: int, recompute: bool) -> int:
    """All-gathers and reduce-scatters of one of `tensor` ranks."""
    block, table, limits = _sizes(model, tensor)
    return _gathers(model, block, table, limits, recompute) + _buckets(model, block, table, limits.bucket)


def small(m: ModelConfig) -> int:
    """Norms and biases: level 3 leaves them whole on every rank, and gathers each after an update."""
    norm = 2 if m.norm == "layernorm" and m.bias else 1
    block = 2 * norm + 2 * m.qk_norm + 3 * (m.bias or m.qkv_bias)
    if m.bias:
        block += 3 if m.activation == "swiglu" else 2
        block += 1
    return m.layers * block + norm


@functools.lru_cache(maxsize=1024)
def level_2(model: ModelConfig, tensor: int, replicas: int) -> int:
    """Reductions of a microbatch: each owner's part of the matrices and of the norms, again where a bucket ends."""
    block, table, limits = _sizes(model, tensor)
    return 2 * replicas + _buckets(model, block, table, limits.bucket)


def _sizes(model: ModelConfig, tensor: int) -> tuple[list[float], float, Limits]:
    block = list(_matrices(model, tensor))
    table = model.vocab_size * model.width / tensor
    elements = sum(block) * model.layers + table * (1 if model.tied else 2)
    return block, table, zero_limits(elements, sum(block))


def _matrices(m: ModelConfig, tensor: int) -> Iterator[float]:
    """Elements of a block's matrices in the order of the forward pass; smaller parameters stay on every rank."""
    kv = m.width * m.num_kv_heads * m.dim_per_head / min(tensor, m.num_kv_heads)
    heads = m.width * m.num_heads * m.dim_per_head / tensor
    up = 2 if m.activation == "swiglu" else 1
    yield from (heads, kv, kv, heads, *(m.width * m.ffn / tensor,) * (up + 1))


def _gathers(m: ModelConfig, block: list[float], table: float, limits: Limits, recompute: bool) -> int:
    ends = {"embedding": table}, {"embedding" if m.tied else "head": table}
    blocks = [{f"{i}.{j}": size for j, size in enumerate(block)} for i in range(m.layers)]
    order = [ends[0], *blocks, ends[1], ends[1], *reversed(blocks), ends[0]]
    coming = deque((i, name, size) for i, held in enumerate(order) for name, size in held.items())
    here: dict[str, float] = {}
    count = 0
    for i, held in enumerate(order):
        count += any(name not in here for name in held)
        here |= held
        while coming and coming[0][0] <= i:
            coming.popleft()
        backward = m.layers + 2 < i < len(order) - 1
        for _ in range(2 if backward and recompute else 1):  # computed again, a block is entered twice
            room, ahead = min(limits.live - sum(here.values()), limits.ahead), 0.0
            while coming and ahead < room:
                _, name, size = coming.popleft()
                if name not in here:
                    here[name] = size
                    ahead += size
            count += ahead > 0
        kept = order[i + 1] if i + 1 < len(order) else {}
        for name in held:
            if name not in kept and not (m.tied and name == "embedding"):
                here.pop(name, None)
    return count


def _buckets(m: ModelConfig, block: list[float], table: float, bucket: float) -> int:
    count, filled = 1, 0.0
    for size in [*(() if m.tied else (table,)), *reversed(block * m.layers), table]:
        if filled and filled + size > bucket:
            count, filled = count + 1, 0.0
        filled += size
    return count
