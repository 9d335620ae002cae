"""What every rank of an import world runs: engines of several layouts, each filled from a directory.

python -m tests.runs.import_worker FOLDER

FOLDER holds cases.json and the directories that it names (or URLs); rank 0 writes CASE.pt with the logical tensors. A
case whose "dcp" is set is first saved by this world as a distributed checkpoint, every matrix in parts on both ranks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from bigtrain.config import Config
from bigtrain.engine import make_engine
from bigtrain.grid import grid_of
from bigtrain.interop.initial import start_from
from bigtrain.mesh import Mesh, build_axes, rendezvous
from bigtrain.model.build import build_model
from tests.foreign_parts import config_of, model_config, weights_of
from tests.runs.engine_parts import gathered
from tests.runs.layout_worker import apart


def save_sharded(folder: Path, name: str, world: Mesh) -> None:
    """The model's weights as FSDP saves them: rows of every tensor on each rank, the norms on both."""
    devices = init_device_mesh("cpu", (world.world,))
    state = {
        n: distribute_tensor(t, devices, [Shard(0) if t.dim() > 1 else Replicate()])
        for n, t in weights_of(model_config(name)).items()
    }
    dcp.save(state, checkpoint_id=folder)


def run(case: dict[str, Any], folder: Path, world: Mesh) -> dict[str, Any]:
    """The logical tensors of an engine that was filled from case["path"], and how far replicas differ."""
    config: Config = config_of(model_config(case["model"]), precision=case.get("precision", "fp32"))
    config = config.model_copy(update={"layout": config.layout.model_copy(update=case["layout"])})
    grid = grid_of(config, world.world)
    mesh = replace(world, grid=grid, axes=build_axes(grid, world.rank))
    engine = make_engine(build_model(config.model, device="meta"), config, mesh)
    notes = start_from(
        case["path"] if "://" in case["path"] else str(folder / case["path"]), engine, config, mesh
    )
    found = {"tensors": gathered(engine, mesh), "apart": apart(engine, mesh), "notes": notes}
    engine.close()
    return found


def main(folder: Path) -> None:
    """Run every case in one world: start-up costs more than a case."""
    torch.set_num_threads(1)
    world = rendezvous(timeout_minutes=1.0)
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            if case.get("dcp"):
                save_sharded(folder / case["path"], case["model"], world)
            found = run(case, folder, world)
        except Exception:
            print(f"case {case['name']} on rank {world.rank}", flush=True)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # not past gloo's threads, which abort one exit of 50: see Mesh.close
        if world.first:
            torch.save(found, folder / f"{case['name']}.pt")
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
