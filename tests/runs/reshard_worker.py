"""What every rank of a resharding world does: python -m tests.runs.reshard_worker JOBS.json FOLDER

A job saves (train to step MIDDLE, save in the background, train on to the end) or resumes (load what another layout
saved, train to the end). Rank 0 writes each job's losses and norms to FOLDER/NAME.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import resume
from bigtrain.engine import make_engine
from bigtrain.mesh import Mesh, rendezvous
from tests.runs.engine_parts import STEPS, make_config, make_model, train
from tests.runs.layout_worker import laid_over, names_of_its_own

MIDDLE = STEPS // 2


def run(job: dict[str, Any], world: Mesh) -> dict[str, Any]:
    """The curve of the second half (of both halves when saving)."""
    config = make_config(**job["config"])
    with laid_over(config, world) as mesh:
        engine = make_engine(make_model(config, "meta"), config, mesh)
        if job["do"] == "save":
            saver = Saver(Path(job["checkpoints"]), mesh)
            train(engine, range(MIDDLE), mesh)
            saver.start(MIDDLE, engine.pieces(owned=True), {"engine": engine.extra_state()})
        else:
            found_checkpoint = resume(job["checkpoints"], lambda: engine.pieces(owned=False), mesh)
            assert found_checkpoint is not None
            engine.loaded(found_checkpoint.state["engine"])
        found: dict[str, Any] = train(engine, range(MIDDLE, STEPS), mesh)
        if job["do"] == "save":
            saver.settle()
        engine.close()
    return found


def main(jobs: Path, folder: Path) -> None:
    """Every job in one world: start-up costs more than a job."""
    torch.set_num_threads(1)
    world = rendezvous(timeout_minutes=1.0)
    for number, job in enumerate(json.loads(jobs.read_text())):
        began = time.perf_counter()
        with names_of_its_own(number):
            found = run(job, world)
        if world.first:
            print(f"{job['name']} {time.perf_counter() - began:.1f} s", flush=True)
            (folder / f"{job['name']}.json").write_text(json.dumps(found))
        world.barrier()
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
