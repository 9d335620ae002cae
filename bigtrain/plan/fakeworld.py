"""A world of any size around one process: the real code runs as one rank of it, with tensors that have no numbers.

Tensors are torch's fake ones (shapes, types and storages only), groups are torch's fake ones (collectives return at
once). Nothing is left behind: torch and DeepSpeed are as they were, after an error too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bigtrain.config import Config
from bigtrain.errors import UserError
from bigtrain.grid import grid_of
from bigtrain.mesh import Mesh, build_axes
from bigtrain.model import init
from bigtrain.parallel import context
from bigtrain.place import Place

GPUS_PER_NODE = 8
"""What DeepSpeed is told of the node; nothing that is measured depends on it."""


@contextlib.contextmanager
def fake_world(config: Config, world: int, rank: int) -> Iterator[Mesh]:
    """Be rank `rank` of `world` ranks laid out as `config` says, until the block ends.

    Raises UserError when the layout cannot work on so many ranks, or when this process is a rank already.
    """
    grid = grid_of(config, world)
    if dist.is_initialized():
        raise UserError(
            "a dry run makes a world of its own, and this process is a rank of another",
            do="start the dry run in a process of its own: bigtrain plan CONFIG --gpus N --dry-run",
        )
    place = Place(rank, world, rank % GPUS_PER_NODE, min(world, GPUS_PER_NODE), "dry run")
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(mock.patch.dict(os.environ))  # DeepSpeed is told by variables
        stack.enter_context(_fake_groups(world, rank))
        if _shards(config, world):
            stack.enter_context(_deepspeed())
        mesh = Mesh(place, torch.device("cpu"))
        if world > 1:
            mesh = Mesh(place, torch.device("cpu"), dist.group.WORLD, grid, build_axes(grid, rank))
        stack.callback(_forget_groups, mesh)
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _convert))
        stack.enter_context(mock.patch.object(init, "fill_box", _not_filled))
        stack.enter_context(mock.patch.object(context, "causal_lower_right", outside_of_modes))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Oracle())
        yield mesh


class Oracle(TorchDispatchMode):
    """Answers when the code asks a tensor for a number: 1.0 or 1; False of truth values; two tensors are always equal.

    So every loss and norm is 1: finite, nothing overflowed, and no step is skipped.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            if dtype in (torch.bool, torch.uint8):  # DeepSpeed's flags are bytes
                return False
            return 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.aten.equal.default and any(isinstance(a, FakeTensor) for a in args):
            return True
        return func(*args, **(kwargs or {}))


def outside_of_modes(*size: int) -> Any:
    """torch's bias object of causal attention, which cannot be made while a dispatch mode watches (torch 2.13)."""
    with _disable_current_modes():
        return causal_lower_right(*size)


@contextlib.contextmanager
def _fake_groups(world: int, rank: int) -> Iterator[None]:
    """torch.distributed with the backend that does nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _forget_groups(mesh: Mesh) -> None:
    """Whoever keeps the mesh keeps no group that is gone."""
    if mesh.world == 1:
        return  # its axes are those of every process that is alone
    object.__setattr__(mesh, "group", None)
    for axis in mesh.axes.values():
        object.__setattr__(axis, "group", None)


def _shards(config: Config, world: int) -> bool:
    """Whether the engine is DeepSpeed's."""
    from bigtrain.engine import engine_name

    return engine_name(config, world) == "zero" and config.layout.zero > 0


_STATEFUL = (
    "deepspeed.utils.groups",
    "deepspeed.comm.comm",
    "deepspeed.accelerator.real_accelerator",
    "deepspeed.runtime.zero.partition_parameters",
    "deepspeed.runtime.zero.utils",
)
"""Where DeepSpeed keeps what is one for the whole process: groups, the accelerator."""


@contextlib.contextmanager
def _deepspeed() -> Iterator[None]:
    """DeepSpeed on a CPU, its state as it was afterwards; rank 0's numbers, which it asks for, are this rank's."""
    from bigtrain.engine.zero import quiet

    os.environ["DS_ACCELERATOR"] = "cpu"
    with quiet():
        modules = [importlib.import_module(name) for name in _STATEFUL]
    before = [dict(vars(module)) for module in modules]
    accelerator: Any = modules[2]
    accelerator.ds_accelerator = None
    between: Any = modules[4]
    broadcast = between.get_lst_from_rank0

    def of_rank_0(numbers: list[int]) -> list[int]:
        broadcast(numbers)  # the same collective as in a real run
        return numbers

    between.get_lst_from_rank0 = of_rank_0
    between.assert_lst_len_same_as_other_ranks = lambda numbers: broadcast([len(numbers)])
    try:
        yield
    finally:
        for module, values in zip(modules, before, strict=True):
            _restore(module, values)
        gc.collect()


def _restore(module: ModuleType, values: dict[str, Any]) -> None:
    """Give a module the variables that it had."""
    now = vars(module)
    for name in [name for name in now if name not in values]:
        del now[name]
    now.update(values)


def _convert(
    module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> nn.Module:
    """nn.Module._apply for fake parameters: torch would exchange the objects, which others refer to, and fails."""
    for inner in module.modules() if recurse else (module,):
        for parameter in inner._parameters.values():
            if parameter is not None:
                with torch.no_grad():
                    parameter.data = convert(parameter)
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = convert(buffer)
    return module


def _not_filled(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
    """Initial values are billions of small operations, and fake tensors have none."""
