"""What every rank of a layout world runs: each case of a JSON file on its own grid; rank 0 writes what came out.

python -m tests.runs.layout_worker CASES.json FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from bigtrain.config import Config
from bigtrain.engine import make_engine
from bigtrain.grid import grid_of
from bigtrain.mesh import Mesh, build_axes, rendezvous
from tests.runs import planted
from tests.runs.engine_parts import STEPS, gathered, make_config, make_model, sample, train

Case = dict[str, Any]


def run(case: Case, world: Mesh) -> Case:
    """The logical tensors before the first step, after it and at the end; losses and norms; a held-out sum."""
    config = make_config(**case["config"])
    with laid_over(config, world) as mesh, planted.error(case.get("plant", ""), mesh):
        engine = make_engine(make_model(config, "meta"), config, mesh)
        found: Case = {"start": gathered(engine, mesh)}
        steps = case.get("steps", STEPS)
        sequences = case["sequences"]
        curves = train(engine, range(1), mesh, sequences)
        found["first"] = gathered(engine, mesh)
        for key, values in train(engine, range(1, steps), mesh, sequences).items():
            curves[key] += values
        batches = [sample(n) for n in range(mesh.data_rank, case["held_out"], mesh.data_size)]
        (found["nll"],) = mesh.sum([engine.evaluate(batches)])
        found |= {"tensors": gathered(engine, mesh), **curves}
        # Replicas that drift apart would go unseen where only one of them is saved.
        found["apart"] = apart(engine, mesh)
        engine.close()
    return found


@contextmanager
def laid_over(config: Config, world: Mesh) -> Iterator[Mesh]:
    """The grid that a config asks for, over the ranks of a world that has met once for many configs.

    Its groups are gone afterwards: gloo has a thread for each that wakes a hundred times a second, and with those of
    15 cases kept a case of 8 ranks took 30 s instead of 10.
    """
    if world.world == 1:
        yield world
        return
    grid = grid_of(config, world.world)
    mesh = replace(world, grid=grid, axes=build_axes(grid, world.rank))
    try:
        yield mesh
    finally:
        for group in {id(axis.group): axis.group for axis in mesh.axes.values() if axis.group}.values():
            dist.destroy_process_group(group)
        for axis in mesh.axes.values():
            object.__setattr__(axis, "group", None)  # the last reference: its threads end
        gc.collect()


@contextmanager
def names_of_its_own(case: int) -> Iterator[None]:
    """Groups of each case under names that no other has had: the store still knows where the former ones listened.

    torch names a group made by some ranks after them and after how many groups there are.
    """
    named = c10d._process_group_name
    with mock.patch.object(c10d, "_process_group_name", lambda *a, **b: f"{case}/{named(*a, **b)}"):
        yield


def apart(engine: Any, mesh: Mesh) -> float:
    """Largest difference between two ranks' copies of the same element of a weight."""
    held = [(f"{p.kind}/{p.name}", p.offset, p.tensor.detach().clone()) for p in engine.pieces(owned=False)]
    seen: dict[Any, torch.Tensor] = {}
    worst = 0.0
    for part in mesh.gather(held):
        for key, offset, tensor in part:  # type: ignore[attr-defined]
            other = seen.setdefault((key, offset, tuple(tensor.shape)), tensor)
            worst = max(worst, float((other - tensor).abs().max()) if tensor.numel() else 0.0)
    return worst


def main(cases: Path, folder: Path) -> None:
    """Run every case in one world: start-up costs more than a case."""
    torch.set_num_threads(1)
    world = rendezvous(timeout_minutes=1.0)
    for number, case in enumerate(json.loads(cases.read_text())):
        started = time.perf_counter()
        try:
            with names_of_its_own(number):
                found = run(case, world)
        except Exception:
            print(f"case {case['name']} on rank {world.rank}", flush=True)
            traceback.print_exc()
            sys.exit(1)
        if world.first:
            found["seconds"] = time.perf_counter() - started
            torch.save(found, folder / f"{case['name']}.pt")
            print(f"{case['name']} {found['seconds']:.1f} s", flush=True)
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
