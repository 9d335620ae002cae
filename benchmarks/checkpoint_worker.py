"""What every rank of a world of `checkpoint.py` does: python checkpoint_worker.py save|load FOLDER MILLIONS ROUNDS."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import list_checkpoints, load
from bigtrain.checkpoint.store import save as save_now
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh, rendezvous

KINDS = ("master", "exp_avg", "exp_avg_sq")
WIDTH = 1024
Case = dict[str, Any]


def shapes(millions: int) -> dict[str, tuple[int, int]]:
    """Matrices like a transformer's, some 4 million elements each."""
    return {f"layers.{i}.weight": (1_000_000 // WIDTH * 4, WIDTH) for i in range(millions // 4)}


def state_of(mesh: Mesh, millions: int, *, filled: bool) -> list[Piece]:
    """This rank's rows of every tensor; `filled` with numbers that depend on the element only."""
    found = []
    for name, (rows, columns) in shapes(millions).items():
        first, end = rows * mesh.rank // mesh.world, rows * (mesh.rank + 1) // mesh.world
        for number, kind in enumerate(KINDS):
            tensor = torch.zeros(end - first, columns)
            if filled:
                torch.arange(first * columns, end * columns, out=tensor.view(-1)).mul_(1e-6).add_(number)
            found.append(Piece(kind, name, (rows, columns), (first, 0), tensor))
    return found


def dtensors(pieces: list[Piece], mesh: Mesh) -> dict[str, Any]:
    """The same memory as DCP takes it."""
    device_mesh = init_device_mesh("cpu", (mesh.world,))
    return {
        f"{p.kind}.{p.name}": DTensor.from_local(
            p.tensor, device_mesh, [Shard(0)], shape=torch.Size(p.shape), stride=(p.shape[1], 1)
        )
        for p in pieces
    }


class Resident:
    """How far the resident set rises above where it was."""

    def __enter__(self) -> Resident:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.rise = max(0, _status("VmHWM") - self.before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def save(mesh: Mesh, folder: Path, millions: int, rounds: int) -> dict[str, list[Case]]:
    """Every way of saving, in turns."""
    pieces = state_of(mesh, millions, filled=True)
    whole = dtensors(pieces, mesh)
    background = dist.new_group(backend="gloo")
    saver = Saver(folder / "background", mesh)
    step = 0

    def ours() -> Callable[[], None]:
        save_now(folder / "ours", step, pieces, {}, mesh)
        return lambda: None

    def ours_async() -> Callable[[], None]:
        saver.start(step, pieces, {})
        return saver.settle

    def writer(where: str, threads: int) -> Any:
        return dcp.FileSystemWriter(folder / where / f"step_{step}", thread_count=threads)

    def dcp_sync(threads: int) -> Callable[[], None]:
        dcp.save(whole, storage_writer=writer(f"dcp{threads}", threads))
        return lambda: None

    def dcp_async(threads: int) -> Callable[[], None]:
        future: Any = dcp.async_save(
            whole, storage_writer=writer(f"dcp_async{threads}", threads), process_group=background
        )
        return lambda: future.result()

    def plain() -> Callable[[], None]:
        path = folder / "plain" / f"step_{step}" / f"rank_{mesh.rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as f:
            torch.save({f"{p.kind}.{p.name}": p.tensor for p in pieces}, f)
            f.flush()
            os.fsync(f.fileno())
        return lambda: None

    ways: dict[str, tuple[str, Callable[[], Callable[[], None]]]] = {
        "ours": ("ours", ours),
        "ours in the background": ("background", ours_async),
        "DCP, 1 thread": ("dcp1", lambda: dcp_sync(1)),
        "DCP, 2 threads": ("dcp2", lambda: dcp_sync(2)),
        "DCP in the background, 1 thread": ("dcp_async1", lambda: dcp_async(1)),
        "DCP in the background, 2 threads": ("dcp_async2", lambda: dcp_async(2)),
        "torch.save": ("plain", plain),
    }
    size = mesh.sum([sum(p.tensor.nbytes for p in pieces)])[0]
    found: dict[str, list[Case]] = {name: [] for name in ways}
    first: dict[str, dict[str, float]] = {}
    for number in range(-1, rounds):  # the first is told apart: files, buffers and caches are made
        step = number + 1
        for name in list(ways)[:: 1 if number % 2 else -1]:
            where, way = ways[name]
            mesh.barrier()
            with Resident() as resident:
                began = time.perf_counter()
                end = way()
                blocked = time.perf_counter() - began
                end()
                mesh.barrier()
                total = time.perf_counter() - began
            written = sum(f.stat().st_size for f in newest(folder / where).rglob("*") if f.is_file())
            blocked, memory = map(max, zip(*mesh.gather((blocked, resident.rise)), strict=True))
            case = {
                "blocked": blocked,
                "total": total,
                "bytes": written,
                "state_bytes": size,
                "memory": memory,
            }
            if number < 0:
                first[name] = {"first_blocked": blocked, "first_memory": memory}
            else:
                found[name].append(case | first[name])
            mesh.barrier()
            if mesh.first and number < rounds - 1:  # the last ones are loaded
                shutil.rmtree(newest(folder / where))
            mesh.barrier()
    return found


def newest(folder: Path) -> Path:
    """The checkpoint that was just saved."""
    return max(folder.glob("step_*"), key=lambda p: int(p.name[5:]))


def load_all(mesh: Mesh, folder: Path, millions: int, rounds: int) -> dict[str, list[Case]]:
    """Every way of loading, in turns; each must bring back what was saved."""
    expected = state_of(mesh, millions, filled=True)
    target = state_of(mesh, millions, filled=False)
    whole = dtensors(target, mesh)
    ours, theirs = list_checkpoints(folder / "ours")[-1], newest(folder / "dcp2")

    def read(verify: bool) -> None:
        load(ours, target, verify=verify, mesh=mesh)

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: read(True),
        "ours, not verified": lambda: read(False),
        "DCP": lambda: dcp.load(whole, checkpoint_id=theirs),
    }
    found: dict[str, list[Case]] = {name: [] for name in ways}
    for number in range(-1, rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            for piece in target:
                piece.tensor.zero_()
            mesh.barrier()
            with Resident() as resident:
                began = time.perf_counter()
                ways[name]()
                mesh.barrier()
                total = time.perf_counter() - began
            memory = max(mesh.gather(resident.rise))  # type: ignore[type-var]
            assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(target, expected, strict=True)), name
            if number >= 0:
                found[name].append({"total": total, "memory": memory})
    return found


def main() -> None:
    """One world."""
    what, folder, millions, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    mesh = rendezvous(timeout_minutes=2.0)
    if mesh.world == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = {"save": save, "load": load_all}[what](mesh, folder, millions, rounds)
    if mesh.first:
        (folder / f"{what}.json").write_text(json.dumps(found))
    mesh.barrier()
    mesh.close()


if __name__ == "__main__":
    main()
