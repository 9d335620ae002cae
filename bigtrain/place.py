"""Which process am I: what torchrun, SLURM's srun, Open MPI, MPICH or nobody says of a rank and its peers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.errors import UserError


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


def fill_environment(place: Place) -> None:
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
    """The machine of rank 0. UserError where an MPI launcher spans machines, for it does not say which that is."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if place.launcher == "slurm" and nodes:
        names = _scontrol("hostnames", nodes).split()
        # The address by which SLURM itself reaches the node; its name need not be known to the resolver.
        address = re.search(r"NodeAddr=(\S+)", _scontrol("node", names[0])) if names else None
        return address[1] if address else "127.0.0.1"
    if place.launcher in ("openmpi", "mpich") and place.local_world < place.world:
        raise UserError(
            f"MASTER_ADDR is not set, and only {place.local_world} of the {place.world} ranks are on this machine",
            where=place.launcher,
            do="mpirun -x MASTER_ADDR=<the machine of rank 0>; launch/mpirun.sh does",
        )
    return "127.0.0.1"


def _scontrol(what: str, which: str) -> str:
    """What SLURM says of nodes; "" when it does not."""
    told = subprocess.run(["scontrol", "show", what, which], capture_output=True, text=True, check=False)
    return told.stdout
