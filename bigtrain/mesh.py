"""The grid of ranks: rendezvous from any launcher, and the one frozen object that owns the groups.

torchrun, SLURM's srun, Open MPI, MPICH / Intel MPI and a single process all end in the same `Mesh`, which is
passed to whatever communicates. Nothing reads a global process group.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.errors import RunError, UserError
from bigtrain.grid import AXES, Grid
from bigtrain.lastwords import lost_connection
from bigtrain.place import Place, discover, fill_environment
from bigtrain.rollcall import excuse, roll_call

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits in a collective for the others (NCCL's default is 10 minutes, gloo's 30): one of them may
save a checkpoint, or verify a corpus, meanwhile. A rank that died is noticed at once, by its connection."""


@dataclass(frozen=True)
class Axis:
    """Ranks that differ along one direction of the grid only (or along a product of directions)."""

    name: str
    ranks: tuple[int, ...]
    """Global ranks, in the order of the axis."""
    rank: int
    """This process's place among them."""
    group: dist.ProcessGroup | None = None
    """None when there is only one."""

    @property
    def size(self) -> int:
        """Ranks on the axis."""
        return len(self.ranks)


ALONE = {name: Axis(name, (0,), 0) for name in (*AXES, "replica", "model", "heads", "ends", "down", "up")}


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks and the groups of all its axes, built once and passed to whatever communicates."""

    place: Place
    device: torch.device
    group: dist.ProcessGroup | None = None
    """All ranks."""
    grid: Grid = field(default_factory=Grid)
    axes: Mapping[str, Axis] = field(default_factory=lambda: ALONE)
    """pipeline, data, context, expert, tensor, and their products: see `_AXES_OF`."""
    store: Any = None
    """Where the ranks met, and where one that fails leaves word for the others."""

    @property
    def rank(self) -> int:
        """This process, 0 to world - 1."""
        return self.place.rank

    @property
    def world(self) -> int:
        """All processes of the run."""
        return self.place.world

    @property
    def tensor(self) -> Axis:
        """Ranks that share each layer."""
        return self.axes["tensor"]

    @property
    def context(self) -> Axis:
        """Ranks that share each sequence."""
        return self.axes["context"]

    @property
    def pipeline(self) -> Axis:
        """Ranks that hold one model together, layer after layer."""
        return self.axes["pipeline"]

    @property
    def replica(self) -> Axis:
        """data x context: ranks that hold the same weights, whose gradients are summed."""
        return self.axes["replica"]

    @property
    def model(self) -> Axis:
        """pipeline x tensor: ranks whose weights make one model, so one gradient norm."""
        return self.axes["model"]

    @property
    def data_rank(self) -> int:
        """This rank's place on the data axis."""
        return self.axes["data"].rank

    @property
    def data_size(self) -> int:
        """Ranks on the data axis."""
        return self.axes["data"].size

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for all that read the same samples: first on every axis but data."""
        return self.pipeline.rank == self.context.rank == self.tensor.rank == 0

    @property
    def first(self) -> bool:
        """The one rank that writes logs and prints."""
        return self.place.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64."""
        if self.world == 1:
            return [float(v) for v in values]
        # gloo and NCCL both reduce float64; the tensor lives where the backend can reach it.
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return [float(v) for v in total.tolist()]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            dist.barrier(group=self.group)

    def gather(self, value: object) -> list[object]:
        """One small picklable value of every rank, on every rank, in rank order (trusted peers only)."""
        if self.world == 1:
            return [value]
        values: list[object] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def close(self) -> None:
        """Leave the process groups."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # Without the last reference its threads are joined here. One that still drops a finished collective's
            # tensors while Python shuts down aborts the process (seen in 1 of 50 exits of torch 2.13 with gloo).
            object.__setattr__(self, "group", None)
            for axis in self.axes.values():
                object.__setattr__(axis, "group", None)


# Which directions each axis spans. "down" and "up" are one channel a direction for pipeline messages: with one
# communicator for both, NCCL would let two ranks that send to each other wait for each other.
_AXES_OF = {
    **{name: (name,) for name in AXES},
    "replica": ("data", "context"),
    "model": ("pipeline", "tensor"),
    "down": ("pipeline",),
    "up": ("pipeline",),
}


def build_axes(grid: Grid, rank: int) -> dict[str, Axis]:
    """The groups that hold `rank` on every axis and product of axes (collective among each group's ranks)."""
    built: dict[tuple[object, ...], dist.ProcessGroup | None] = {}

    def axis(name: str, ranks: tuple[int, ...], *, own: bool = False) -> Axis:
        """`own`: a group of its own, where another axis has one of the same ranks, and for one rank too."""
        group = None
        if len(ranks) > 1 or own:
            key = (*ranks, own and name)
            if key not in built:
                # use_local_synchronization: a rank makes its own groups only, so that 16,384 ranks start as fast.
                # torch names such a group by how many there are already: all ranks must make equally many.
                built[key] = dist.new_group(list(ranks), use_local_synchronization=True)
            group = built[key]
        return Axis(name, ranks, ranks.index(rank), group)

    axes = {
        name: axis(name, grid.ranks(rank, *spans), own=name in ("down", "up") and grid.pipeline > 1)
        for name, spans in _AXES_OF.items()
    }
    tensor, shared = axes["tensor"], grid.shared_heads
    first = tensor.rank // shared * shared
    axes["heads"] = axis("heads", tensor.ranks[first : first + shared])
    stages = axes["pipeline"].ranks
    ends = tuple(dict.fromkeys((stages[0], stages[-1])))
    if axes["model"].size > 1:  # DeepSpeed takes no group for all ranks, so one rank alone needs a group too
        axes["alone"] = axis("alone", (rank,), own=True)
    axes["ends"] = axis("ends", ends if rank in ends else (rank,), own=grid.pipeline > 1)
    return axes


def choose_device(place: Place) -> torch.device:
    """This rank's own GPU; the CPU where there is none. Raises UserError when ranks would have to share GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # One GPU is this rank's own where the launcher shows each rank one (SLURM's --gpus-per-task).
    if 1 < count < place.local_world:
        raise UserError(
            f"{place.local_world} ranks were started on this machine, which has {count} GPUs that they may use",
            where="CUDA_VISIBLE_DEVICES",
            do="start one rank a GPU, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU",
        )
    device = torch.device("cuda", place.local_rank % count)
    torch.cuda.set_device(device)
    return device


def record_collectives() -> None:
    """Have torch's flight recorder remember the last collectives, for NCCL and gloo, and NCCL write it when one times
    out. `bigtrain.whereabouts` reads it. torch reads these variables when the first group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def rendezvous(
    grid: Grid | None = None,
    *,
    place: Place | None = None,
    facts: Mapping[str, str] | None = None,
    timeout_minutes: float = 10.0,
) -> Mesh:
    """Find this process's place, choose its device, join the others, make the groups of `grid`.

    Without a grid all ranks lie on the data axis. `facts` must be equal on all ranks: what each is about to do
    (its config, its code); whether it has a GPU is one more. Raises UserError when they are not, or when some rank
    cannot have a device of its own; RunError naming the ranks that did not come within `timeout_minutes`.
    """
    place = place or discover()
    grid = grid or Grid(data=place.world)
    if place.world == 1:
        return Mesh(place, choose_device(place))
    assert grid.world == place.world, f"a grid of {grid} for {place.world} ranks"
    fill_environment(place)
    timeout = timedelta(minutes=timeout_minutes)
    try:
        device = choose_device(place)
    except UserError as e:
        excuse(place, e, timeout)
        raise
    record_collectives()
    store = roll_call(place, {**(facts or {}), "device": device.type}, timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout
        )
        axes = build_axes(grid, place.rank)
    except (RuntimeError, ValueError) as e:
        raise lost_connection(e, store, place.rank) or RunError(
            f"the {place.world} ranks met, but could not connect: {e}",
            where=f"rank {place.rank}",
            do="check that the machines reach each other on the network that GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME names",
        ) from e
    for group in {dist.group.WORLD, *(axis.group for axis in axes.values() if axis.group)}:
        dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)
    return Mesh(place, device, dist.group.WORLD, grid, axes, store)
