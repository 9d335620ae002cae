"""Every collective that one rank takes part in, by mesh axis: how often, and how many bytes it sends.

Bytes are those that one rank sends by the ring algorithm: all-reduce 2 (n - 1) / n S, all-gather, reduce-scatter and
all-to-all (n - 1) / n S of the full size S, a message S, a broadcast or reduce S but for its last rank, on n ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.mesh import Mesh


class Sent(NamedTuple):
    """One collective, or one end of a message."""

    axis: str
    """See `NAMES`."""
    op: str
    """all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, reduce, send, recv or barrier."""
    bytes: float
    """That this rank sends; 0 of recv."""
    size: float
    """Bytes of the whole tensor."""
    ranks: int
    """Of its group."""
    stride: int
    """From one of its ranks to the next."""
    waits: bool
    """Whether the code that called waits for it."""
    peer: int = -1
    """Of send and recv: the other end's place in the group."""


Totals = dict[tuple[str, str], tuple[int, float]]
"""(axis, operation) -> calls, bytes."""

NAMES = ("tensor", "context", "pipeline", "data", "replica", "model", "heads")
"""An axis is called by the first of these that has its ranks: on 2 tensor ranks `model` is `tensor`. All ranks are
"world", the two ends of a pipeline "ends", one rank "alone"."""


class _Group(NamedTuple):
    axis: str
    ranks: int
    stride: int
    me: int


class Calls:
    """Reads calls of c10d's operations."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._known: dict[str, _Group] = {}

    def read(self, func: Any, args: Any) -> Sent:
        """What a call is. AssertionError of an operation that bigtrain and DeepSpeed do not use."""
        name = func._schema.name.removeprefix("c10d::").strip("_")
        axis, n, stride, me = self._group(next(g for g in map(_group, args) if g is not None))
        op, size, share = name, 0.0, (n - 1) / n
        match name:
            case "send" | "recv":
                size = _bytes(args[0])
                return Sent(axis, op, size if name == "send" else 0.0, size, n, stride, False, args[2])
            case "allreduce" | "allreduce_coalesced":
                op, size, share = "all-reduce", _bytes(args[0]), 2 * share
            case "allgather_base" | "allgather" | "allgather_into_tensor_coalesced":
                op, size = "all-gather", _bytes(args[0])
            case "reduce_scatter_base" | "reduce_scatter" | "reduce_scatter_tensor_coalesced":
                op, size = "reduce-scatter", _bytes(args[1])
            case "alltoall_base":
                op, size = "all-to-all", _bytes(args[1])
            case "broadcast":
                size, share = _bytes(args[0]), float(me != (args[2] - 1) % n)
            case "reduce":
                size, share = _bytes(args[0]), float(me != args[3])
            case "barrier":
                pass
            case _:
                raise AssertionError(f"a collective that is not known here: {name}")
        return Sent(axis, op, share * size, size, n, stride, not _asynchronous(func, args))

    def gathered(self, name: str, size: float) -> Sent:
        """An all-gather over the group of this name."""
        group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]
        axis, n, stride, _ = self._group(group)
        return Sent(axis, "all-gather", (n - 1) / n * size, size, n, stride, True)

    def _group(self, group: dist.ProcessGroup) -> _Group:
        if group.group_name not in self._known:
            ranks = tuple(dist.get_process_group_ranks(group))
            stride = ranks[1] - ranks[0] if len(ranks) > 1 else 0
            self._known[group.group_name] = _Group(self._axis(ranks), len(ranks), stride, group.rank())
        return self._known[group.group_name]

    def _axis(self, ranks: tuple[int, ...]) -> str:
        for name in NAMES:
            if len(ranks) > 1 and self.mesh.axes[name].ranks == ranks:
                return name
        return "alone" if len(ranks) == 1 else "world" if len(ranks) == self.mesh.world else "ends"


class Traffic(TorchDispatchMode):
    """Every collective of c10d that runs inside, DeepSpeed's and those of backward passes too (a CPU's autograd
    runs in the thread that called it)."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.calls = Calls(mesh)
        self.seen: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen.append(self.calls.read(func, args))
        return func(*args, **(kwargs or {}))


def totals(seen: Iterable[tuple[Sent, int]]) -> Totals:
    """Of calls and how often each comes, by axis and operation.

    What a rank does alone sends nothing and is left out; a message counts where it is sent.
    """
    found: defaultdict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for s, times in seen:
        if s.ranks > 1 and s.op != "recv":
            calls, size = found[s.axis, s.op]
            found[s.axis, s.op] = calls + times, size + times * s.bytes
    return dict(found)


def _asynchronous(func: Any, args: Any) -> bool:
    """Whether the call returns at once; told by an argument that is true where nothing is said."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "async_op":
            return bool(args[i]) if i < len(args) else True
    return True


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
