"""Saves in the background: the copy is of the moment, one at a time, said when committed, failures told to all."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint import saver as module
from bigtrain.checkpoint import store
from bigtrain.checkpoint.saver import HostMemory, Saver
from bigtrain.errors import RunError
from bigtrain.mesh import rendezvous
from tests.runs.worlds import run_world
from tests.test_checkpoint_store import ONE, check, split, tensors


class Gate:
    """Holds writers until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.writing = threading.Event(), 0
        real = module.write_file

        def write(*args: Any, **kwargs: Any) -> Any:
            self.writing += 1
            assert self.opened.wait(20)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "write_file", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.opened.set()


def start(saver: Saver, step: int) -> dict[tuple[str, str], torch.Tensor]:
    """Begin to save the tensors of a step; returns them."""
    whole = tensors(step)
    saver.start(step, split(whole, 0, 1), {"step": step})
    return whole


def test_what_was_when_it_started_is_saved(tmp_path: Path, gate: Gate) -> None:
    saver = Saver(tmp_path, ONE)
    for tensor in start(saver, 1).values():
        tensor.zero_()  # the next training steps
    gate.opened.set()
    saver.settle()
    check(tmp_path / "step_00000001", 1)


def test_saved_is_said_when_it_is_committed_and_once(tmp_path: Path, gate: Gate) -> None:
    saver = Saver(tmp_path, ONE)
    start(saver, 1)
    assert saver.news() is None
    assert store.list_checkpoints(tmp_path) == []
    gate.opened.set()
    saver.settle()
    news = saver.news()
    assert news is not None
    assert news.path == tmp_path / "step_00000001"
    assert 0 < news.blocked <= news.seconds
    assert saver.news() is None


def test_one_save_is_in_flight(tmp_path: Path, gate: Gate) -> None:
    saver = Saver(tmp_path, ONE)
    start(saver, 1)
    second = threading.Thread(target=start, args=(saver, 2))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the second save waits for the first"
    assert gate.writing == 1
    gate.opened.set()
    second.join(20)
    saver.settle()
    for step in (1, 2):
        check(tmp_path / f"step_{step:08d}", step)


def test_retention_follows_the_commit(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ONE, committed=lambda: store.prune(tmp_path, 2))
    for step in (1, 2, 3):
        start(saver, step)
    saver.settle()
    assert [p.name for p in store.list_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failed_save_is_told_and_the_older_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    saver = Saver(tmp_path, ONE, asynchronous=asynchronous)
    start(saver, 1)
    saver.settle()
    saver.news()
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", refuse)
        with pytest.raises(RunError, match="No space left on device"):
            start_and_settle(saver, 2)
    assert saver.news() is None
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    check(tmp_path / "step_00000001", 1)
    assert not saver.failed, "it was told; the next save is a new chance"
    start(saver, 3)
    saver.settle()
    check(tmp_path / "step_00000003", 3)


def start_and_settle(saver: Saver, step: int) -> None:
    """A save to its end."""
    start(saver, step)
    deadline = time.monotonic() + 20
    while not saver.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    saver.settle()


def refuse(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_without_memory_for_a_copy_it_saves_while_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(self: HostMemory, pieces: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(HostMemory, "copy", none_left)
    saver = Saver(tmp_path, ONE)
    start(saver, 1)
    check(tmp_path / "step_00000001", 1)
    assert "step 1 is saved while training waits" in caplog.text


def test_the_copy_is_kept_in_one_buffer_for_all_saves() -> None:
    memory = HostMemory(torch.device("cpu"))
    pieces = split(tensors(1), 0, 1)
    first = memory.copy(pieces)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(first, pieces, strict=True))
    again = memory.copy(split(tensors(2), 0, 1))
    assert [p.tensor.data_ptr() for p in again] == [p.tensor.data_ptr() for p in first]
    assert torch.equal(again[3].tensor, split(tensors(2), 0, 1)[3].tensor)


def test_a_failing_run_lets_its_save_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINGER", 2.0)
    gate = Gate(monkeypatch)
    saver = Saver(tmp_path, ONE)
    start(saver, 1)
    threading.Timer(0.3, gate.opened.set).start()
    saver.leave()
    check(tmp_path / "step_00000001", 1)


def three_ranks(folder: str) -> None:
    """What several ranks do; all of them run it."""
    mesh = rendezvous()
    root = Path(folder)
    saver = Saver(root, mesh)
    for step in (1, 2):
        saver.start(step, split(tensors(step), mesh.rank, mesh.world), {"step": step})
    mesh.sum([1])  # a training step meanwhile
    saver.settle()
    assert (saver.news() is not None) == mesh.first
    for step in (1, 2):
        check(root / f"step_{step:08d}", step)
    mesh.barrier()
    # Rank 1 cannot write: its thread says so, the sum of a step tells all, and all raise its error.
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    saver.start(3, split(tensors(3), mesh.rank, mesh.world), {"step": 3})
    while not mesh.sum([saver.failed])[0]:
        time.sleep(0.02)
    with pytest.raises(
        RunError, match=r"(?s)^rank 1, .*rank_00001.bin: could not be written: File too large"
    ):
        saver.settle()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.start(4, split(tensors(4), mesh.rank, mesh.world), {"step": 4})
    saver.settle()
    mesh.barrier()
    assert sorted(p.name for p in root.iterdir()) == [f"step_0000000{n}" for n in (1, 2, 4)]
    check(root / "step_00000004", 4)
    # Rank 2 never writes its file and the run fails: rank 0 does not wait for it for ever.
    module._LINGER = 0.3
    if mesh.rank == 2:
        module.write_file = lambda *_, **__: time.sleep(60)  # type: ignore[assignment]
    saver.start(5, split(tensors(5), mesh.rank, mesh.world), {"step": 5})
    if mesh.first:
        saver.leave()
        assert "rank 2 of 3 did not write in time" in str(saver._failure)
        assert sorted(p.name for p in root.iterdir()) == [f"step_0000000{n}" for n in (1, 2, 4)]
    mesh.barrier()
    mesh.close()


def test_three_ranks_save_and_fail_together(tmp_path: Path) -> None:
    program = "import sys; from tests.test_checkpoint_saver import three_ranks; three_ranks(sys.argv[1])"
    run_world(["-c", program, str(tmp_path)], 3)
