"""What every rank of a layout world runs: each case of a JSON file on its own grid; rank 0 writes what came out.

python -m tests.runs.layout_worker CASES.json FOLDER
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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
    mesh = laid_over(config, world)
    with planted.error(case.get("plant", ""), mesh):
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


def laid_over(config: Config, world: Mesh) -> Mesh:
    """The grid that a config asks for, over the ranks of a world that has met once for many configs."""
    if world.world == 1:
        return world
    grid = grid_of(config, world.world)
    return replace(world, grid=grid, axes=build_axes(grid, world.rank))


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
    for case in json.loads(cases.read_text()):
        started = time.perf_counter()
        try:
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
