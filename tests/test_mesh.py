"""Rendezvous reads every launcher's variables and rejects contradictions."""

from __future__ import annotations

import pytest

from bigtrain.errors import UserError
from bigtrain.mesh import rendezvous
from bigtrain.place import Place, discover


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, Place(0, 1, 0, 1, "single")),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            Place(3, 8, 1, 2, "torchrun"),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            Place(1, 2, 1, 2, "openmpi"),
        ),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
            Place(0, 2, 0, 2, "mpich"),
        ),
        (
            {
                "SLURM_PROCID": "5",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
                "SLURM_STEP_ID": "0",
            },
            Place(5, 8, 1, 4, "slurm"),
        ),
        # An sbatch shell or salloc: SLURM's variables are there, but srun started nothing.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Place(0, 1, 0, 1, "single")),
    ],
)
def test_each_launcher_is_understood(env: dict[str, str], place: Place) -> None:
    assert discover(env) == place


@pytest.mark.parametrize("env", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_contradictory_ranks_are_named(env: dict[str, str]) -> None:
    with pytest.raises(UserError, match="RANK"):
        discover(env)


def test_a_single_process_needs_no_group() -> None:
    mesh = rendezvous()
    assert (mesh.rank, mesh.world, mesh.first, mesh.group) == (0, 1, True, None)
    assert mesh.sum([1, 2.5]) == [1.0, 2.5]
    assert mesh.gather("x") == ["x"]
    mesh.barrier()
    mesh.close()
