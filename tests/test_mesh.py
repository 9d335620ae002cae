"""Rendezvous reads every launcher's variables and rejects contradictions."""

from __future__ import annotations

import pytest
import torch

from bigtrain.errors import UserError
from bigtrain.mesh import choose_device, rendezvous
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


@pytest.mark.parametrize(
    ("gpus", "local_world", "chosen"), [(8, 8, "cuda:5"), (8, 6, "cuda:5"), (1, 8, "cuda:0")]
)
def test_each_rank_has_a_gpu_of_its_own(
    gpus: int, local_world: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(gpus, monkeypatch)
    assert str(choose_device(Place(13, 16, 5, local_world, "slurm"))) == chosen


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(4, monkeypatch)
    with pytest.raises(UserError, match=r"8 ranks were started on this machine, which has 4 GPUs"):
        choose_device(Place(13, 16, 5, 8, "slurm"))


def pretend(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch say that it has so many GPUs: this machine has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
