"""Errors to plant, each of a kind that parallel training has shipped with: the parity checks must see all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from bigtrain.engine import replica
from bigtrain.engine.reference import norm_of
from bigtrain.mesh import Mesh
from bigtrain.parallel import apply
from bigtrain.parallel.linear import RowLinear
from bigtrain.parallel.region import Region

NAMES = (
    "shuffled shard",
    "missing sum of norms",
    "missing all-reduce",
    "double-counted norms",
    "off-by-one stage boundary",
    "shuffled gradient",
)


@contextlib.contextmanager
def error(name: str, mesh: Mesh) -> Iterator[None]:
    """Run with the error `name` planted ("" plants none)."""
    match name:
        case "":
            yield
        case "shuffled shard":  # a tensor rank holds its columns in another order
            with patch.object(RowLinear, "forward", shuffled(RowLinear.forward, mesh)):
                yield
        case "missing sum of norms":  # sequence parallelism without the sum of its partial gradients
            with patch.object(replica, "sum_parts", lambda gradients, mesh: None):
                yield
        case "missing all-reduce":  # the gradient of what enters a tensor region stays partial
            with patch.object(Region, "begin_enter_grad", lambda self, grad: Done(grad)):
                yield
        case "double-counted norms":  # replicated parameters count once a tensor rank
            with patch.object(replica.ReplicaEngine, "_norm", count_all):
                yield
        case "off-by-one stage boundary":
            split = apply.layers_of_chunks
            with patch.object(apply, "layers_of_chunks", lambda config: exchanged(split(config))):
                yield
        case "shuffled gradient":
            honest = Region.leave_grad
            with patch.object(Region, "leave_grad", lambda self, grad: honest(self, grad).flip(-1)):
                yield
        case _:
            raise AssertionError(f"no such error: {name}")


class Done:
    """A collective that never took place."""

    def __init__(self, result: torch.Tensor) -> None:
        self.result = result

    def wait(self) -> torch.Tensor:
        """What was there before."""
        return self.result


def shuffled(forward: Any, mesh: Mesh) -> Any:
    """The layer, its input features reversed on one rank."""
    return lambda layer, x: forward(layer, x.flip(-1) if mesh.tensor.rank == 1 else x)


def count_all(engine: Any) -> torch.Tensor:
    """The norm without asking who counts."""
    square = norm_of(master.grad for master in engine.masters).double().square()
    dist.all_reduce(square, group=engine.mesh.model.group)
    return square.sqrt()


def exchanged(parts: list[range]) -> list[Any]:
    """The layers on both sides of the first boundary change places."""
    first, second = list(parts[0]), list(parts[1])
    first[-1], second[0] = second[0], first[-1]
    return [first, second, *parts[2:]]
