"""A Hopper SM in Python that runs kernels in Gluon, which Triton's interpreter does not know, by their own source.

    hopper = source("attention_hopper_tiles", "attention_hopper")   # the module, with this file in place of Gluon
    out, lse = hopper.forward(q, k, v, ...)                         # CPU tensors; every launch runs here
    with schedule(seed): ...                                        # another order of events

What it is strict about is what only concurrency breaks:

- Partitions of warps take turns at every operation that meets others, in an order drawn from a seed, with some of them
  far slower than others. When none can go on, DeadlockError says who waits for what.
- A TMA load fills its buffer with NaN when it is issued, and with the data some time later.
- Tensor cores read their operands in shared memory when they are waited for, and their result cannot be used before.
- HazardError: a buffer is read while a load fills it, filled or written while a product reads it, written by threads
  and read by a product (which needs a fence, that no kernel here has), a barrier arrived at too often, an address out
  of bounds.

Numbers are as on the GPU: products of 16-bit operands summed in fp32, integer division truncated. What it does not
know: layouts (a wrong one does not compile: gate_attention.py), threads of one partition (they are in step), speed.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WAIT_SECONDS = 120
KERNELS = Path(__file__).parents[2] / "kernels/bigtrain_kernels"


class HazardError(Exception):
    """Two operations meet in a way whose result depends on their timing."""


class DeadlockError(Exception):
    """Every partition waits."""


# -- What a program computes with ---------------------------------------------------------------------------------


def raw(x: Any) -> Any:
    if isinstance(x, Pending):
        raise HazardError("a product's result is used before warpgroup_mma_wait returned it")
    return x.t if isinstance(x, Value) else x


def value(x: Any) -> Any:
    """Python's integers as the scalars that Triton makes of what a function returns."""
    return Value(torch.tensor(x, dtype=torch.int32)) if type(x) is int else x


class Value:
    """A tensor in registers. Types are promoted by torch's rules for tensors of equal rank, as Triton does."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    dtype = property(lambda self: self.t.dtype)
    shape = property(lambda self: tuple(self.t.shape))
    type = property(lambda self: types.SimpleNamespace(layout=None))

    def to(self, dtype: torch.dtype) -> Value:
        return Value(self.t.to(dtype))

    def __getitem__(self, at: Any) -> Value:
        return Value(self.t[at])

    def __index__(self) -> int:
        return int(self.t)

    def __bool__(self) -> bool:
        return bool(self.t)

    def __invert__(self) -> Value:
        return Value(~self.t)

    def __neg__(self) -> Value:
        return Value(-self.t)


def _binary(compute: Callable[[Any, Any], torch.Tensor]) -> tuple[Any, Any]:
    def both(a: Any, b: Any) -> Any:
        if isinstance(a, Value) and isinstance(b, Value):
            common = torch.promote_types(a.dtype, b.dtype)
            return Value(compute(a.t.to(common), b.t.to(common)))
        return Value(compute(raw(a), raw(b)))

    def forth(self: Value, other: Any) -> Any:
        return NotImplemented if isinstance(other, Pointer) else both(self, other)

    return forth, lambda self, other: both(other, self)


def _divide(a: Any, b: Any) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def _install_operators() -> None:
    arithmetic = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "truediv": lambda a, b: a / b,
        "floordiv": _divide,
        "mod": lambda a, b: a - _divide(a, b) * b,
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }
    for name, compute in arithmetic.items():
        forth, back = _binary(compute)
        setattr(Value, f"__{name}__", forth)
        setattr(Value, f"__r{name}__", back)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Value, f"__{name}__", _binary(lambda a, b, name=name: getattr(torch, name)(a, b))[0])


_install_operators()


class Pending:
    """The result of a product that has not been waited for: an accumulator, and nothing else."""

    def __init__(self, compute: Callable[[], torch.Tensor], shape: tuple[int, ...]) -> None:
        self.compute, self.shape, self.result = compute, shape, None

    t = property(lambda self: raw(self))
    to = property(lambda self: raw(self))
    __mul__ = __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = lambda self, other: raw(self)


class Pointer:
    """Addresses in a tensor, by element."""

    def __init__(self, base: torch.Tensor, at: Any = 0) -> None:
        self.base, self.at = base, at
        self.dtype = types.SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.base, Value(torch.as_tensor(raw(self.at))) + other)

    def cells(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The storage, positions in it (0 where masked), and the mask."""
        at = torch.as_tensor(raw(self.at)).long()
        mask = torch.as_tensor(True if mask is None else raw(mask))
        at, mask = torch.broadcast_tensors(at, mask)
        size = self.base.numel()
        if bool((mask & ((at < 0) | (at >= size))).any()):
            raise HazardError(f"an address outside of a tensor of {size} elements")
        return self.base.as_strided((size,), (1,)), torch.where(mask, at, 0), mask


class Descriptor:
    """A tensor map; the host's TensorDescriptor has the same fields."""

    def __init__(
        self, base: torch.Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any
    ) -> None:
        if base.data_ptr() % 16 or strides[-1] != 1 or any(s % 8 for s in strides[:-1]):
            raise HazardError(f"TMA takes 16-byte multiples, not strides of {strides}")
        self.view = base.as_strided(shape, strides)
        self.block_shape, self.layout, self.dtype = block_shape, layout, base.dtype

    def block(self, at: list[int]) -> torch.Tensor:
        """Zeros come from outside."""
        out = torch.zeros(self.block_shape, dtype=self.dtype)
        here, there = [], []
        for start, length, size in zip(at, self.block_shape, self.view.shape, strict=True):
            first, last = max(0, start), max(0, min(size, start + length))
            if last <= first:
                return out
            here.append(slice(first, last))
            there.append(slice(first - start, last - start))
        out[tuple(there)] = self.view[tuple(here)]
        return out


# -- What partitions meet in --------------------------------------------------------------------------------------


class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and all expected bytes have."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count, self.left, self.bytes, self.phase = name, count, count, 0, 0

    def arrive(self, count: int, expected: int = 0) -> None:
        if count > self.left:
            raise HazardError(f"{self.name} is arrived at {count - self.left} times too often in a phase")
        self.left -= count
        self.land(-expected)

    def land(self, count: int) -> None:
        self.bytes -= count
        if not self.left and not self.bytes:
            self.left, self.phase = self.count, self.phase + 1

    def passes(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Cell:
    """One buffer: what is in flight in it."""

    def __init__(self) -> None:
        self.filling = False
        self.readers = 0
        self.written = False
        self.barrier: Barrier | None = None


class Shared:
    """Shared memory, by `index` split into buffers that are watched one by one."""

    def __init__(
        self, data: torch.Tensor, cells: dict[Any, Cell], number: int, path: tuple[int, ...] = ()
    ) -> None:
        self.data, self.cells, self.number, self.path = data, cells, number, path

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: tuple(self.data.shape))
    cell = property(lambda self: self.cells.setdefault(self.path, Cell()))
    name = property(lambda self: f"allocation {self.number} {list(self.path)}")

    def index(self, i: Any) -> Shared:
        if not 0 <= int(i) < len(self.data):
            raise HazardError(f"buffer {int(i)} of {len(self.data)}")
        return Shared(self.data[int(i)], self.cells, self.number, (*self.path, int(i)))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order), self.cells, self.number, self.path)

    def reshape(self, shape: tuple[int, ...]) -> Shared:
        return Shared(self.data.view(shape), self.cells, self.number, self.path)

    def load(self, layout: Any) -> Value:
        machine().pause()
        if self.cell.filling:
            raise HazardError(f"threads read {self.name} while it is filled")
        return Value(self.data.clone())

    def store(self, x: Value) -> None:
        machine().pause()
        if self.cell.filling or self.cell.readers:
            raise HazardError(f"threads write {self.name} while it is in use")
        self.data.copy_(x.t)
        self.cell.written = True


# -- Who takes turns ----------------------------------------------------------------------------------------------


class Partition:
    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.name, self.run = name, run
        self.go = threading.Semaphore(0)
        self.until: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.done = False
        self.products: deque[tuple[Pending, list[Cell]]] = deque()


class Machine:
    """One program at a time: its partitions, and the copies in flight."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.program = 0
        self.allocated = 0
        self.copies: list[Callable[[], None]] = []
        self.partitions: list[Partition] = []
        self.main = Partition("the start", lambda: None)
        self.now = self.main
        self.back = threading.Semaphore(0)
        self.error: BaseException | None = None

    def pause(self, until: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Let the others go on until it is this partition's turn and `until` holds."""
        me = self.now
        if me is self.main:
            if not until():
                raise DeadlockError(f"the program waits for {waits_for} before its partitions start")
            return
        me.until, me.waits_for = until, waits_for
        self.back.release()
        me.go.acquire()
        if self.error:
            raise SystemExit

    def specialize(self, runs: list[tuple[str, Callable[[], None]]]) -> None:
        self.partitions = [Partition(name, run) for name, run in runs]
        for one in self.partitions:
            threading.Thread(target=self._work, args=(one,), daemon=True).start()
        slow = {one: 10 ** self.random.uniform(-2, 0) for one in [*self.partitions, None]}
        while any(not one.done for one in self.partitions):
            ready: list[Partition | None] = [p for p in self.partitions if not p.done and p.until()]
            ready += [None] if self.copies else []
            if not ready and not self.error:
                waiting = [f"{p.name} waits for {p.waits_for}" for p in self.partitions if not p.done]
                self.error = DeadlockError("; ".join(waiting))
            if self.error:
                ready = [p for p in self.partitions if not p.done]
            chosen = self.random.choices(ready, [slow[one] for one in ready])[0]
            if chosen is None:
                self.copies.pop(self.random.randrange(len(self.copies)))()
                continue
            self.now = chosen
            chosen.go.release()
            if not self.back.acquire(timeout=WAIT_SECONDS):
                raise DeadlockError(f"{chosen.name} does not come back")
        self.now = self.main
        if self.error:
            raise self.error
        if self.copies:
            raise HazardError(f"{len(self.copies)} loads are in flight when the program ends")

    def _work(self, one: Partition) -> None:
        one.go.acquire()
        try:
            if not self.error:
                one.run()
                if one.products:
                    raise HazardError(f"{one.name} ends with {len(one.products)} products in flight")
        except SystemExit:
            pass
        except BaseException as e:
            self.error = self.error or e
        one.done = True
        self.back.release()

    def finish(self, outstanding: int) -> None:
        """Products of this partition, oldest first, until `outstanding` are left."""
        queue = self.now.products
        while len(queue) > outstanding:
            pending, cells = queue.popleft()
            pending.result = pending.compute()
            for cell in cells:
                cell.readers -= 1


_machine: Machine | None = None
_seed = 0


def machine() -> Machine:
    assert _machine is not None, "outside of a kernel"
    return _machine


@contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Launches inside take turns in another order."""
    global _seed
    before, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = before


# -- The language -------------------------------------------------------------------------------------------------


class Kernel:
    """gluon.jit: called by others it is a function, launched with a grid it runs program by program."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *args: Any) -> Any:
        out = self.function(*args)
        return tuple(map(value, out)) if isinstance(out, tuple) else value(out)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int = 4, maxnreg: int = 0, **constants: Any) -> None:
            global _machine
            given = [Pointer(x) if isinstance(x, torch.Tensor) else value(x) for x in args]
            for program in range(grid[0]):
                _machine = Machine(_seed * 1_000_003 + program)
                _machine.program = program
                try:
                    self.function(*given, **constants)
                finally:
                    _machine = None

        return launch


def jit(function: Any = None, **options: Any) -> Any:
    return Kernel(function) if function else Kernel


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    cells, at, mask = pointer.cells(mask)
    return Value(torch.where(mask, cells[at], torch.tensor(raw(other), dtype=cells.dtype)))


def store(pointer: Pointer, x: Value, mask: Any = None) -> None:
    cells, at, mask = pointer.cells(mask)
    if x.dtype != cells.dtype:
        raise HazardError(f"{x.dtype} is stored to {cells.dtype}")
    cells[at[mask]] = x.t.broadcast_to(mask.shape)[mask]


def where(seen: Any, a: Any, b: Any) -> Value:
    return Value(torch.where(torch.as_tensor(raw(seen)), raw(a), raw(b)))


def _extreme(torchs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], Any]:
    return lambda a, b: Value(torchs(torch.as_tensor(raw(a)), torch.as_tensor(raw(b))))


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    filled = float("nan") if dtype.is_floating_point else 0
    machine().allocated += 1
    return Shared(torch.full(shape, filled, dtype=dtype), {}, machine().allocated)


def warp_specialize(parts: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    if len(warps) != len(parts) - 1 or len(registers) != len(parts) - 1:
        raise HazardError("the first partition has the kernel's warps, all others are given theirs")
    machine().specialize(
        [
            (f"{run.__name__} {i}", lambda run=run, args=args: run(*args))
            for i, (run, args) in enumerate(parts)
        ]
    )


def _full(shape: list[int], x: Any, dtype: torch.dtype, layout: Any = None) -> Value:
    return Value(torch.full(shape, raw(x), dtype=dtype))


LANGUAGE = types.SimpleNamespace(
    constexpr=lambda x: x,
    static_range=range,
    float32=torch.float32,
    bfloat16=torch.bfloat16,
    float16=torch.float16,
    int64=torch.int64,
    load=load,
    store=store,
    where=where,
    minimum=_extreme(torch.minimum),
    maximum=_extreme(torch.maximum),
    arange=lambda first, last, layout: Value(torch.arange(first, last, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout: _full(shape, 0, dtype),
    full=_full,
    exp2=lambda x: Value(torch.exp2(x.t)),
    log2=lambda x: Value(torch.log2(x.t)),
    max=lambda x, axis: Value(x.t.amax(axis)),
    sum=lambda x, axis: Value(x.t.sum(axis)),
    convert_layout=lambda x, layout: Value(x.t),
    program_id=lambda axis: value(machine().program),
    allocate_shared_memory=allocate_shared_memory,
    warp_specialize=warp_specialize,
    barrier=lambda: None,
    NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda shape, dtype: None),
    **{
        name: lambda *a, **k: None
        for name in (
            "NVMMADistributedLayout",
            "DotOperandLayout",
            "SliceLayout",
            "BlockedLayout",
            "SwizzledSharedLayout",
        )
    },
)


def _init(at: Shared, count: int) -> None:
    at.cell.barrier = Barrier(f"the barrier in {at.name}", count)


def _wait(at: Shared, phase: Any) -> None:
    parity = int(phase)
    machine().pause(lambda: at.cell.barrier.passes(parity), f"{at.cell.barrier.name}, parity {parity}")


def _arrive(at: Shared, *, count: int) -> None:
    machine().pause()
    at.cell.barrier.arrive(count)


def _expect(at: Shared, count: int) -> None:
    machine().pause()
    at.cell.barrier.arrive(1, count)


MBARRIER = types.SimpleNamespace(
    MBarrierLayout=lambda: None, init=_init, wait=_wait, arrive=_arrive, expect=_expect
)


def _async_load(source: Descriptor, at: list[Any], barrier: Shared, to: Shared) -> None:
    machine().pause()
    cell, where = to.cell, [int(x) for x in at]
    if cell.filling or cell.readers:
        raise HazardError(f"{to.name} is filled at {where} while it is in use")
    cell.filling = True
    to.data.fill_(float("nan"))

    def land() -> None:
        to.data.copy_(source.block(where))
        cell.filling = False
        barrier.cell.barrier.land(to.data.numel() * to.data.element_size())

    machine().copies.append(land)


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
) -> Value | Pending:
    machine().pause()
    cells = [x.cell for x in (a, b) if isinstance(x, Shared)]
    for cell in cells:
        if cell.filling or cell.written:
            raise HazardError("a product reads a buffer that is being filled, or that threads wrote")
        cell.readers += 1
    kept = None if not use_acc else acc

    def compute() -> torch.Tensor:
        left, right = (raw(x) if isinstance(x, Value) else x.data for x in (a, b))
        if left.dtype != right.dtype:
            raise HazardError(f"a product of {left.dtype} and {right.dtype}")
        product = left.float() @ right.float()
        if kept is None:
            return product
        return product + (kept.result if isinstance(kept, Pending) else kept.t)

    pending = Pending(compute, tuple(acc.shape))
    machine().now.products.append((pending, cells))
    if is_async:
        return pending
    machine().finish(0)
    return Value(pending.result)


def warpgroup_mma_wait(outstanding: int, deps: list[Any]) -> Any:
    machine().pause()
    machine().finish(outstanding)
    out = [Value(x.result) if isinstance(x, Pending) and x.result is not None else x for x in deps]
    return out[0] if len(out) == 1 else tuple(out)


HOPPER = types.SimpleNamespace(
    mbarrier=MBARRIER,
    tma=types.SimpleNamespace(async_load=_async_load),
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
)


def source(*names: str, folder: Path = KERNELS) -> Any:
    """The last of these modules of bigtrain_kernels, each executed with this language in place of Gluon's."""
    gluon = "triton.experimental.gluon"
    replaced: dict[str, Any] = {
        gluon: types.SimpleNamespace(jit=jit, language=LANGUAGE),
        f"{gluon}.language": LANGUAGE,
        f"{gluon}.language.nvidia.hopper": HOPPER,
        f"{gluon}.nvidia.hopper": types.SimpleNamespace(TensorDescriptor=Descriptor),
    }
    import triton.experimental

    before = {name: sys.modules.get(name) for name in [*replaced, *(f"bigtrain_kernels.{n}" for n in names)]}
    real = getattr(triton.experimental, "gluon", None)
    sys.modules.update(replaced)
    triton.experimental.gluon = replaced[gluon]
    try:
        for name in names:
            full = f"bigtrain_kernels.{name}"
            spec = importlib.util.spec_from_file_location(full, folder / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[full] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    finally:
        for name, one in before.items():
            if one is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = one
        if real is None:
            del triton.experimental.gluon
        else:
            triton.experimental.gluon = real
    return module
