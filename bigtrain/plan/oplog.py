"""What one rank does in a step, in order: matrix products, passes over memory, collectives, messages, waits.

Most layers and microbatches do the same, so an operation is written down as the number of its kind: four bytes.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bigtrain.mesh import Mesh
from bigtrain.parallel.schedule import Action
from bigtrain.plan.storages import Places
from bigtrain.plan.traffic import Calls, Sent, Totals, totals

aten = torch.ops.aten


class Compute(NamedTuple):
    """One kernel."""

    op: str
    flops: int
    """By torch.utils.flop_counter's formulas; 0 of what is bound by memory."""
    bytes: int
    """Read and written."""
    dims: tuple[int, ...] = ()
    """Of a matrix product: rows, inner, columns, and how many of them."""
    again: int = 0
    """How many of the flops are recomputed: model FLOPs, as in MFU, do not count them."""
    block: bool = False
    """Whether it is of one of the model's blocks, forward or backward."""


class Wait(NamedTuple):
    """Nothing goes on before a collective or message is there: the one that was started `back` starts ago."""

    back: int


class Mark(NamedTuple):
    """Here begins an action of a pipeline's schedule; None: what comes after the schedule."""

    action: Action | None


Item = Compute | Sent | Wait | Mark


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _product_in_place(of: Any) -> Callable[..., int]:
    formula = flop_registry[of]
    return lambda *args, out_val=None, **kwargs: int(formula(*args, out_val=out_val, **kwargs))


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch 2.13 has no formulas for these.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.addmm_: _product_in_place(aten.addmm),
    aten.baddbmm_: _product_in_place(aten.baddbmm),
}
_MADE_ONLY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_MADE_ONLY |= {aten.detach, aten.lift_fresh, aten.alias, aten._unsafe_view}
_MADE_ONLY |= {aten.unbind, aten.split, aten.split_with_sizes, aten._reshape_alias, aten.resize_, aten.set_}
"""Operations that launch nothing."""
_NO_WORK = ("prim", "profiler")
"""prim: fake tensors are asked for their device."""
_OFFSETS = {0: (0, 1), 2: (2, 3)}
"""Where, after q, k and v, attention takes the offsets of documents: forward, and backward, whose q is the third."""
_LOOK_UPS = {aten.embedding, aten.index_select, aten.gather, aten.index}
"""Operations that read only what they return of their first argument."""


class OpLog(TorchDispatchMode):
    """Writes down all that operations do inside, on fake tensors or on real ones."""

    def __init__(self, mesh: Mesh, places: Places, row: int) -> None:
        """`row`: tokens of a sequence."""
        super().__init__()
        self.places, self.row = places, row
        self.calls = Calls(mesh)
        self.table: dict[Item, int] = {}
        """Kinds of work -> their number."""
        self.work = array("I")
        self._started = 0
        self._pending: dict[int, int] = {}
        """Storages that a collective has still to fill or to read -> its number."""

    def restart(self) -> None:
        """Forget all work so far."""
        self.work = array("I")
        self._started = 0
        self._pending.clear()

    def items(self) -> Iterator[Item]:
        """All work, in order."""
        kinds = list(self.table)
        return (kinds[number] for number in self.work)

    def counts(self) -> dict[Item, int]:
        """How often each kind of work is done."""
        kinds = list(self.table)
        return {kinds[number]: count for number, count in Counter(self.work).items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._communicate(self.calls.read(func, args), args)
        elif func._overloadpacket is aten._local_scalar_dense:
            self._wait(args)
        elif func.namespace not in _NO_WORK and not func.is_view:
            self._compute(func, args, kwargs, result)
        return result

    def note_action(self, action: Action | None) -> None:
        """An action of the schedule begins."""
        self._note(Mark(action))

    def _note(self, item: Item) -> None:
        self.work.append(self.table.setdefault(item, len(self.table)))

    def _communicate(self, sent: Sent, args: Any) -> None:
        if sent.ranks == 1:
            return
        if sent.op != "recv":  # what it sends must have been made
            self._wait(args[:2])
        self._note(sent)
        if sent.waits:
            self._started += 1
            self._note(Wait(1))
            return
        if sent.op != "send":
            for tensor in _tensors(args[:2]):
                self._pending[tensor.untyped_storage()._cdata] = self._started
        self._started += 1

    def _wait(self, args: Any) -> None:
        """Wait for what still fills any of these tensors."""
        if not self._pending:
            return
        for tensor in _tensors(args):
            number = self._pending.pop(tensor.untyped_storage()._cdata, None)
            if number is not None:
                self._pending = {k: n for k, n in self._pending.items() if n != number}
                self._note(Wait(self._started - number))

    def _compute(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        packet = func._overloadpacket
        if packet in _MADE_ONLY:
            if self._pending:  # the same address can come again
                for tensor in _tensors(result):
                    self._pending.pop(tensor.untyped_storage()._cdata, None)
            return
        self._wait((args, kwargs))
        if func.namespace == "bigtrain":
            self._exchange(packet, args)
        flops = again = 0
        dims: tuple[int, ...] = ()
        # Our kernels tell theirs when they are loaded.
        formula = _FLOPS.get(packet) or flop_registry.get(packet)
        if formula is not None:
            if func.namespace == "bigtrain" and "attention" in str(packet):
                args = self._by_rows(packet, args)
            flops = int(formula(*args, **kwargs, out_val=result))
            again = self._again(packet, flops)
            if "mm" in packet._qualified_op_name:
                dims = _dims(args)
            elif "linear_cross_entropy" in packet._qualified_op_name:  # hidden (T, C) by weight (V, C)
                dims = (*args[0].shape, args[1].shape[0], 1)
        self._note(
            Compute(
                packet._qualified_op_name.removeprefix("aten::"),
                flops,
                _traffic(func, args, kwargs, result),
                dims,
                again,
                "layers." in self.places.module(),
            )
        )

    def _by_rows(self, packet: Any, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments of packed attention, as if rows were the only documents: offsets that are fake are not known.

        That is the most that documents can cost, and what the planner reckons with.
        """
        q = 2 * ("backward" in str(packet))
        if args[q + 3 + q] is None:
            return args
        rows = args[q].shape[1] // self.row
        shaped = [x.view(rows, self.row, *x.shape[2:]) for x in args[q : q + 3]]
        rest = args[q + 3 :]
        return [*args[:q], *shaped, *(None if i in _OFFSETS[q] else x for i, x in enumerate(rest))]

    def _exchange(self, packet: Any, args: Any) -> None:
        """What one of our kernels sends while it runs; each is waited for here, though only the last need be."""
        from bigtrain_kernels.workspace import gathers  # loads triton

        for size in gathers(packet, args):
            self._note(self.calls.gathered(args[11], float(size)))
            self._started += 1
            self._note(Wait(1))

    def _again(self, packet: Any, flops: int) -> int:
        """Of a checkpointed module's second forward pass all, of fused attention's backward the scores."""
        if torch._C._current_autograd_node() is not None and self.places.inside:
            return flops
        # Of its five products one makes the scores again.
        return flops // 5 if "attention" in str(packet) and "backward" in str(packet) else 0


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (v for v in tree_iter(values) if isinstance(v, torch.Tensor) and v.device.type != "meta")


def _dims(args: Sequence[Any]) -> tuple[int, ...]:
    """Of the product's two factors, which come last."""
    a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
    return (*a.shape[-2:], b.shape[-1], a.shape[0] if a.dim() == 3 else 1)


def _traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written; a tensor that is written in place counts for both."""
    read = list(_tensors((args, kwargs)))
    looks_up = func._overloadpacket in _LOOK_UPS
    if looks_up:
        read = read[1:]
    made = _bytes(_tensors(result))
    if not func._schema.returns:  # lists of tensors are changed in place, as by _fused_adam_
        made = sum(
            _bytes(_tensors(args[i] if i < len(args) else kwargs.get(a.name)))
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        )
    return _bytes(read) + made * (2 if looks_up else 1)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Work(NamedTuple):
    """Sums over a step of one rank."""

    flops: int
    """Executed."""
    again: int
    """Of these, recomputed."""
    kernels: int
    traffic: Totals


def sums(log: OpLog) -> Work:
    """What a log holds, added up."""
    flops = again = kernels = 0
    sent: defaultdict[Sent, int] = defaultdict(int)
    for item, count in log.counts().items():
        if isinstance(item, Compute):
            flops, again, kernels = flops + count * item.flops, again + count * item.again, kernels + count
        elif isinstance(item, Sent):
            sent[item] += count
    return Work(flops, again, kernels, totals(sent.items()))
