"""Who am I among the ranks: rendezvous from any launcher, and the one frozen object that owns the groups.

torchrun, SLURM's srun, Open MPI, MPICH / Intel MPI and a single process all end in the same `Mesh`, which is
passed to whatever communicates. Nothing reads a global process group.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from bigtrain.errors import RunError, UserError


@dataclass(frozen=True)
class Place:
    """A process among its peers, as the launcher tells it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    launcher: str


# Environment variables of each launcher: rank, world, local rank, local world.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


def discover(env: Mapping[str, str] = os.environ) -> Place:
    """Rank and world from the environment; a single process when no launcher speaks.

    SLURM also sets its variables in a batch shell and in `salloc`, where nothing was launched by srun, so it
    counts only inside a job step (SLURM_STEP_ID). Raises UserError when the numbers contradict each other.
    """
    for launcher, (rank, world, local_rank, local_world) in _LAUNCHERS.items():
        if rank not in env or world not in env:
            continue
        if launcher == "slurm" and not env.get("SLURM_STEP_ID", "").isdigit():
            continue
        try:
            place = Place(
                rank=int(env[rank]),
                world=int(env[world]),
                local_rank=int(env.get(local_rank, "0")),
                local_world=int(env.get(local_world, "1").split("(")[0]),
                launcher=launcher,
            )
        except ValueError as e:
            raise UserError(f"{launcher} set {rank}, {world} to something that is no number: {e}") from e
        if not 0 <= place.rank < place.world:
            raise UserError(f"{rank}={place.rank} does not fit {world}={place.world}", where=launcher)
        return place
    return Place(rank=0, world=1, local_rank=0, local_world=1, launcher="single")


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks. Today one axis, data; `device` is this rank's, `group` spans the data axis."""

    place: Place
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def rank(self) -> int:
        """This process, 0 to world - 1."""
        return self.place.rank

    @property
    def world(self) -> int:
        """All processes of the run."""
        return self.place.world

    @property
    def data_rank(self) -> int:
        """This rank's place on the data axis."""
        return self.place.rank

    @property
    def data_size(self) -> int:
        """Ranks on the data axis."""
        return self.place.world

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
        """Leave the process group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
            # Without the last reference its threads are joined here. One that still drops a finished collective's
            # tensors while Python shuts down aborts the process (seen in 1 of 50 exits of torch 2.13 with gloo).
            object.__setattr__(self, "group", None)


def rendezvous(*, timeout_minutes: float = 10.0) -> Mesh:
    """Find this process's place, choose its device, join the others.

    Raises RunError when the peers do not come within `timeout_minutes`.
    """
    place = discover()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if place.world == 1:
        return Mesh(place, device, None)
    _fill_environment(place)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(minutes=timeout_minutes),
        )
    except (RuntimeError, ValueError) as e:
        raise RunError(
            f"the {place.world} ranks did not meet: {e}",
            where=f"rank {place.rank} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            do="check that every rank was started, with the same MASTER_ADDR and MASTER_PORT",
        ) from e
    return Mesh(place, device, dist.group.WORLD)


def _fill_environment(place: Place) -> None:
    """Set the variables that torch and DeepSpeed read, for launchers that do not set them."""
    defaults = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world,
        "LOCAL_RANK": place.local_rank,
        "LOCAL_WORLD_SIZE": place.local_world,
    }
    for name, value in defaults.items():
        os.environ[name] = str(value)
    os.environ.setdefault("MASTER_ADDR", _first_host(place))
    # A port from the job id keeps two jobs on one node apart; torchrun sets its own.
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("OMPI_MCA_ess_base_jobid") or "0"  # noqa: SIM112
    digits = "".join(c for c in job if c.isdigit()) or "0"
    os.environ.setdefault("MASTER_PORT", str(20000 + int(digits) % 20000))


def _first_host(place: Place) -> str:
    """The host of rank 0: this machine unless SLURM lists several."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if place.launcher != "slurm" or not nodes:
        return "127.0.0.1"
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
    )
    return listed.stdout.split()[0] if listed.stdout.split() else "127.0.0.1"
