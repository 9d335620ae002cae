"""Bytes of live tensor storage, from the operations that make them: what a device's allocator would hold.

Works on fake tensors and on real ones alike, so that one can be held against the other.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK = 512
"""torch's CUDA allocator hands out multiples of this many bytes."""

KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
"""What storages are held for. logits: all that the head and the loss make; buffers: what fits nothing else, such as
buckets of gradients on their way."""


@dataclass(slots=True)
class Held:
    """One storage, from the operation that made it until nothing held it."""

    size: int
    """Bytes, rounded up to blocks."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    """The module, the backward of which module, or the function that made it."""
    kind: str


@dataclass
class Places:
    """Where in the model, or in the code, an operation runs: modules in forward, autograd's nodes in backward."""

    names: dict[int, str] = field(default_factory=dict)
    """Module -> its path, by id; other modules are called by their class."""
    _inside: list[str] = field(default_factory=list)
    _made: dict[int, str] = field(default_factory=dict)
    """Number of an autograd node -> module whose forward pass made it."""

    def __enter__(self) -> Places:
        self._hooks = [
            register_module_forward_pre_hook(lambda module, _: self._inside.append(self._name(module))),
            register_module_forward_hook(lambda *_: self._leave(), always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _name(self, module: torch.nn.Module) -> str:
        return self.names.get(id(module)) or type(module).__name__

    def _leave(self) -> None:
        if self._inside:
            self._inside.pop()

    @property
    def inside(self) -> bool:
        """Whether the forward pass of a module is running."""
        return bool(self._inside)

    def note(self) -> None:
        """Remember for the node that autograd makes now, if it makes one, where that is."""
        if self._inside:
            self._made.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._inside[-1])

    def module(self, node: Any = None) -> str:
        """The module whose forward or backward pass runs; "" outside of both. `node`: autograd's, where it is known."""
        node = node or torch._C._current_autograd_node()
        if self._inside:  # in a node, it is recomputed
            return self._inside[-1]
        if node is None or "AccumulateGrad" in node.name():
            return ""
        return self._made.get(node._sequence_nr(), "")

    def here(self) -> tuple[str, str]:
        """(module or "", how to call the place)."""
        node = torch._C._current_autograd_node()
        if node is not None and "AccumulateGrad" not in node.name():
            module = self.module(node)
            what = "recomputed" if self._inside else f"backward, {node.name()}"
            return module, f"{module} ({what})" if module else node.name()
        if self._inside and node is None:
            return self._inside[-1], self._inside[-1]
        return "", _function()


def _function() -> str:
    """The innermost function of bigtrain or DeepSpeed that is running, outside of this package."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("bigtrain.", "deepspeed.")) and not module.startswith("bigtrain.plan."):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class Storages(TorchDispatchMode):
    """Follows every storage that operations make inside.

    What a kernel allocates and frees inside itself is not seen, but for what our own tell of themselves.
    """

    def __init__(self, places: Places | None = None, *, block: int = BLOCK) -> None:
        """`block`: sizes are rounded up to multiples of it."""
        super().__init__()
        self.places = places
        self.block = block
        self.live = self.peak = 0
        self.held: list[Held] = []
        self._numbers: dict[int, int] = {}
        """Live storages -> their place in `held`."""
        self._log: list[int] = []
        """What came (its place in `held`) and went (~ place)."""

    def restart(self) -> None:
        """Forget what came and went so far; what is live stays."""
        self.peak = self.live
        live = [self.held[n] for n in self._numbers.values()]
        self._numbers = {key: i for i, key in enumerate(self._numbers)}
        self.held, self._log = live, list(range(len(live)))

    def follow(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Say what a tensor is held for; one made outside counts from now on."""
        if tensor.device.type == "meta":
            return
        self._add(tensor)
        if kind is not None:
            self.held[self._numbers[tensor.untyped_storage()._cdata]].kind = kind

    def at_peak(self) -> list[Held]:
        """What was live when most was, since `restart`; the largest first."""
        total = most = at = 0
        for i, entry in enumerate(self._log):
            total += self.held[entry].size if entry >= 0 else -self.held[~entry].size
            if total > most:
                most, at = total, i + 1
        assert most == self.peak, "the log holds all that was counted"
        live: dict[int, Held] = {}
        for entry in self._log[:at]:
            if entry >= 0:
                live[entry] = self.held[entry]
            else:
                del live[~entry]
        return sorted((h for h in live.values() if h.size), key=lambda h: -h.size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # a fake tensor is asked for its device
            return func(*args, **(kwargs or {}))
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.places is not None:
            self.places.note()
        result = func(*args, **(kwargs or {}))
        for value in (result,) if isinstance(result, torch.Tensor) else tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self._add(value)
        if func.namespace == "bigtrain":
            from bigtrain_kernels.workspace import workspace  # loads triton

            self._briefly(workspace(func._overloadpacket, args), func)
        return result

    def _briefly(self, size: int, func: Any) -> None:
        """What one of our kernels holds besides, at the end of which its results are there."""
        if not size:
            return
        module, where = self.places.here() if self.places is not None else ("", "")
        number, size = len(self.held), -(-size // self.block) * self.block
        self.held.append(
            Held(size, (size,), torch.uint8, f"{where}, within {func.name()}", _kind(module, where))
        )
        self._log += [number, ~number]
        self.peak = max(self.peak, self.live + size)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // self.block) * self.block
        number = self._numbers.get(key)
        if number is None:
            weakref.finalize(storage, self._drop, key).atexit = False
        elif self.held[number].size == size:
            return
        else:  # resized
            self._log.append(~number)
            self.live -= self.held[number].size
        self._numbers[key] = len(self.held)
        self._log.append(len(self.held))
        module, where = self.places.here() if self.places is not None else ("", "")
        self.held.append(Held(size, tuple(tensor.shape), tensor.dtype, where, _kind(module, where)))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        number = self._numbers.pop(key)
        self._log.append(~number)
        self.live -= self.held[number].size


def _kind(module: str, where: str) -> str:
    """What a storage is held for, as far as the place tells."""
    if module.rpartition(".")[2] in ("lm_head", "Head", "VocabularyHead"):
        return "logits"
    # Messages of the pipeline are the activations that a stage starts from.
    return "activations" if module or where.startswith("bigtrain.parallel.pipeline.") else "buffers"


def by_kind(held: list[Held]) -> dict[str, int]:
    """Bytes of each kind."""
    found: defaultdict[str, int] = defaultdict(int)
    for h in held:
        found[h.kind] += h.size
    return {kind: found[kind] for kind in KINDS}


def gradients_of(engine: Any) -> Iterator[torch.Tensor]:
    """Where an engine keeps gradients from one microbatch to the next."""
    for weight in engine.model.parameters() if hasattr(engine, "masters") else (p for _, p in engine.records):
        for name in ("grad", "grad_accum", "_hp_grad"):
            if isinstance(found := getattr(weight, name, None), torch.Tensor):
                yield found
    sharder = getattr(engine, "sharder", None)
    for name in ("fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer"):
        for found in tree_iter(getattr(sharder, name, None)):
            if isinstance(found, torch.Tensor):
                yield found
