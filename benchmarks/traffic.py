"""Count what a rank sends, collective by collective, and say what it should send.

Bytes are those that one rank sends by the ring algorithm: all-reduce 2 (n - 1) / n S, all-gather, reduce-scatter and
all-to-all (n - 1) / n S of the full size S, a message S, a broadcast or reduce S but for its last rank. Shapes: n
ranks of an axis, B batch, S sequence, T = B S / context tokens of a rank in a microbatch, m microbatches, C model
width, H heads, K kv heads, D head dim, V vocabulary, L layers of this rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.config import Config
from bigtrain.engine.zero import PERSISTENT_ELEMENTS, PREFETCH_ELEMENTS
from bigtrain.logical import logical_of
from bigtrain.mesh import Mesh
from bigtrain.model.loss import CHUNK_CPU, CHUNK_TOKENS
from bigtrain.parallel.schedule import messages, orders
from bigtrain.parallel.split import layers_of_chunks

E = 4
"""Bytes of an element: these worlds compute in fp32. Planner formulas are written for 2."""


UNCOUNTED = 1_000_000
"""Calls that no formula tells: only bytes are compared."""


class Sent(NamedTuple):
    """One collective, or one kind of it in a formula."""

    axis: str
    op: str
    bytes: float
    calls: int = 1
    why: str = ""
    beyond: float = 0.0
    """How many of the bytes are beyond (below: negative) the planner's formula, and `why` is the reason."""
    fewer: float = 0.0
    """How many bytes fewer there may be, where DeepSpeed decides as it goes."""


class Counter(TorchDispatchMode):
    """Every collective of c10d that runs inside, DeepSpeed's and those of backward passes too (a CPU's autograd
    runs in the thread that called it)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::").strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        group = next(g for g in map(_group, args) if g is not None)
        ranks = tuple(dist.get_process_group_ranks(group))
        n, me = len(ranks), group.rank()
        if name.startswith("recv"):
            return
        share = (n - 1) / n
        match name:
            case "send":
                op, sent = "send", _bytes(args[0])
            case "allreduce" | "allreduce_coalesced":
                op, sent = "all-reduce", 2 * share * _bytes(args[0])
            case "allgather_base" | "allgather" | "allgather_into_tensor_coalesced":
                op, sent = "all-gather", share * _bytes(args[0])
            case "reduce_scatter_base" | "reduce_scatter" | "reduce_scatter_tensor_coalesced":
                op, sent = "reduce-scatter", share * _bytes(args[1])
            case "alltoall_base":
                op, sent = "all-to-all", share * _bytes(args[1])
            case "broadcast":
                op, sent = "broadcast", _bytes(args[0]) * (me != (args[2] - 1) % n)
            case "reduce":
                op, sent = "reduce", _bytes(args[0]) * (me != args[3])
            case "barrier":
                op, sent = "barrier", 0.0
            case _:
                raise AssertionError(f"a collective this benchmark cannot count: {name}")
        self.seen.append((ranks, op, sent))


def _group(argument: Any) -> Any:
    """The process group behind an argument of a c10d operation, if it is one."""
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument)
        except RuntimeError:  # a ReduceOp
            return None
    return None


def _bytes(tensors: Any) -> float:
    if isinstance(tensors, torch.Tensor):
        return float(tensors.numel() * tensors.element_size())
    return sum(_bytes(t) for t in tensors)


Totals = dict[tuple[str, str], tuple[int, float]]
"""(axis, operation) -> calls, bytes."""

NAMES = ("tensor", "context", "pipeline", "data", "replica", "model", "heads")
"""An axis is called by the first of these that has its ranks: on 2 tensor ranks `model` is `tensor`."""


def name_of(ranks: tuple[int, ...], mesh: Mesh) -> str:
    """The axis with these ranks."""
    for name in NAMES:
        if mesh.axes[name].ranks == ranks:
            return name
    return "world" if len(ranks) == mesh.world else "alone" if len(ranks) == 1 else "ends"


def measured(counter: Counter, mesh: Mesh) -> Totals:
    """What was counted, by axis and operation; what one rank does alone sends nothing and is left out."""
    return _totals(Sent(name_of(ranks, mesh), op, sent) for ranks, op, sent in counter.seen if len(ranks) > 1)


def expected(config: Config, mesh: Mesh, model: Mapping[str, Any], batch: tuple[int, int, int]) -> list[Sent]:
    """The formulas' terms, each with its reason, under the axis names of `name_of`."""
    found = []
    for term in _terms(config, mesh, model, batch):
        axis: Any = None if term.axis == "world" else mesh.axes[term.axis]
        ranks = tuple(range(mesh.world)) if axis is None else axis.ranks
        if len(ranks) > 1 and term.calls:
            found.append(term._replace(axis=name_of(ranks, mesh)))
    return found


def totals_of(terms: list[Sent]) -> Totals:
    """The sum of terms."""
    return _totals(iter(terms))


def _totals(sent: Iterator[Sent]) -> Totals:
    found: defaultdict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for s in sent:
        calls, size = found[s.axis, s.op]
        found[s.axis, s.op] = calls + s.calls, size + s.bytes
    return dict(found)


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """What the formulas ask about the weights that this rank holds, before an engine takes them away."""
    records = [(logical_of(p), math.prod(logical_of(p).sizes)) for p in model.parameters()]
    summed: defaultdict[str, list[int]] = defaultdict(list)
    for record, size in records:
        if record.summed:
            summed[record.summed].append(size)
    return {
        "elements": [size for _, size in records],
        "dims": [len(record.shape) for record, _ in records],
        "summed": dict(summed),
    }


def _terms(
    config: Config, mesh: Mesh, model: Mapping[str, Any], batch: tuple[int, int, int]
) -> Iterator[Sent]:
    layout, shape = config.layout, config.model
    B, S, m = batch
    t, c, p = mesh.tensor.size, mesh.context.size, mesh.pipeline.size
    T, C, D = B * S // c, shape.width, shape.dim_per_head
    H, K = shape.num_heads // t, max(1, shape.num_kv_heads // t)
    stages = layers_of_chunks(config) if p > 1 else [range(shape.layers)]
    mine = [i for i in range(len(stages)) if i % p == mesh.pipeline.rank]
    L, first, last = sum(len(stages[i]) for i in mine), 0 in mine, len(stages) - 1 in mine
    again = layout.recompute == "full"
    # Tensor: hidden states of all tokens, (T, C), enter and leave the region of attention and of the mlp.
    ring, hidden = (t - 1) / t, T * C * E
    if layout.sequence:
        inside = 2 * L * m
        gather, scatter = (2 + again) * inside, (2 + again) * inside
        yield Sent("tensor", "all-gather", gather * ring * hidden, gather, "layers")
        yield Sent("tensor", "reduce-scatter", scatter * ring * hidden, scatter, "layers")
        calls = (first + last) * m
        sent = calls * ring * hidden
        yield Sent("tensor", "all-gather", sent, calls, "embedding backward, head forward", sent)
        yield Sent("tensor", "reduce-scatter", sent, calls, "embedding forward, head backward", sent)
    else:
        calls = (2 + 2 + 2 * again) * L * m
        yield Sent("tensor", "all-reduce", calls * 2 * ring * hidden, calls, "layers")
        calls = (first + last) * m
        sent = calls * 2 * ring * hidden
        yield Sent("tensor", "all-reduce", sent, calls, "embedding forward, head backward", sent)
    if last:
        chunk = max(CHUNK_TOKENS, CHUNK_CPU // (shape.vocab_size // t))
        calls = m * -(-T // chunk)
        sent = m * ring * t * 4 * T * 4
        yield Sent(
            "tensor", "all-gather", sent, calls, "loss: 4 fp32 numbers a token, not its V logits", sent
        )
    # Context: keys and values of (B, S / c) gathered, or heads exchanged for tokens.
    ring, passes = (c - 1) / c, L * m * (1 + again)
    if layout.context_by == "gather":
        whole = 2 * B * S * K * D * E
        yield Sent("context", "all-gather", passes * ring * whole, passes, "keys and values")
        yield Sent("context", "reduce-scatter", L * m * ring * whole, L * m, "their gradients")
    else:
        heads = H + 2 * max(K, c)
        sent = (passes + L * m) * ring * T * (heads + H) * D * E
        yield Sent("context", "all-to-all", sent, 2 * (passes + L * m), "q, k, v to heads and back")
    # Pipeline: hidden states and their gradients over every boundary between two ranks.
    if p > 1:
        plan = orders(layout.schedule, p, layout.chunks, m)
        mine_sent = sum(len(f) for (source, _), f in messages(plan).items() if source == mesh.pipeline.rank)
        size = T * C * E // (t if layout.sequence else 1)
        yield Sent(
            "pipeline", "send", mine_sent * size, mine_sent, "hidden states and gradients at boundaries"
        )
    yield from _gradients(config, mesh, model, m)
    sent = 2 * (mesh.world - 1) / mesh.world * 8
    yield Sent("world", "all-reduce", sent, 1, "sum of the loss: one double", sent)


def _gradients(config: Config, mesh: Mesh, model: Mapping[str, Any], m: int) -> Iterator[Sent]:
    layout, n = config.layout, mesh.replica.size
    level = min(layout.zero, 1) if mesh.pipeline.size > 1 else layout.zero
    for name, sizes in model["summed"].items():
        ranks = mesh.axes[name].size
        calls = 1 if level == 0 or mesh.pipeline.size > 1 else len(sizes)
        sent = 2 * (ranks - 1) / ranks * sum(sizes) * E
        yield Sent(name, "all-reduce", sent, calls, "gradients known in parts: norms, tied embedding", sent)
    share = 2 * (mesh.model.size - 1) / mesh.model.size
    if level == 0:
        yield Sent("model", "all-reduce", share * 8, 1, "gradient norm: one double", share * 8)
    else:
        yield Sent("model", "all-reduce", share * 8, 2, "DeepSpeed: gradient norm, overflow flag", share * 8)
    ring, weights = (n - 1) / n, sum(model["elements"]) * E
    if level == 0:
        yield Sent("replica", "all-reduce", 2 * ring * weights, 1, "gradients, once a step")
        return
    sent = 2 * ring * (16 if level == 3 else 8)
    yield Sent("replica", "all-reduce", sent, 2, "DeepSpeed: gradient norm, overflow flag", sent)
    if level < 3:
        # Once a step (1) or a microbatch (2: its memory is the reason). One reduce a bucket and owner, which
        # together send what a reduce-scatter does; how many there are depends on how buckets fall on parts.
        times = 1 if level == 1 else m
        yield Sent(
            "replica", "reduce", times * ring * weights, UNCOUNTED, "gradients, each part to its owner"
        )
        groups = len({dims >= 2 for dims in model["dims"]})
        yield Sent(
            "replica", "all-gather", ring * weights, groups, "updated weights, one call a parameter group"
        )
        return
    small = [size for size in model["elements"] if size < PERSISTENT_ELEMENTS]
    cut = weights - sum(small) * E
    why = "weights, for forward and for backward; those that are read ahead for both are gathered once"
    window = 2 * min(PREFETCH_ELEMENTS, sum(model["elements"]) // 8) + max(model["elements"])
    yield Sent(
        "replica",
        "all-gather",
        m * ring * 2 * cut,
        UNCOUNTED,
        why,
        -m * ring * 2 * (weights - cut),
        m * ring * min(window * E, cut),
    )
    sent = ring * sum(small) * E
    yield Sent(
        "replica", "all-gather", sent, len(small), "updated weights below 10,000 elements, kept whole", sent
    )
    yield Sent("replica", "reduce-scatter", m * ring * weights, UNCOUNTED, "gradients, every microbatch")
