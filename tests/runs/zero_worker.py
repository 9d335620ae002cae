"""What every rank of a parity world runs: each case of a JSON file; rank 0 writes what came out.

python -m tests.runs.zero_worker CASES.json FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bigtrain.engine import Engine, make_engine
from bigtrain.engine.reference import ReferenceEngine
from bigtrain.mesh import Mesh, rendezvous
from tests.runs.engine_parts import (
    STEPS,
    Tensors,
    assemble,
    fill,
    gathered,
    local_boxes,
    lr_of,
    make_config,
    make_model,
    microbatches,
    sample,
    train,
)

Case = dict[str, Any]


def build(case: Case, mesh: Mesh) -> Engine:
    """The case's engine on a fresh model."""
    config = make_config(**case["config"])
    device = "meta" if case.get("as_built") else mesh.device
    return make_engine(make_model(config, device), config, mesh)


def plain(case: Case, mesh: Mesh) -> Case:
    """Train, evaluate, and all logical tensors at the end."""
    engine = build(case, mesh)
    found: Case = train(engine, range(case.get("steps", STEPS)), mesh)
    (found["nll"],) = mesh.sum([engine.evaluate([sample(mesh.rank)])])
    found |= {"tensors": gathered(engine, mesh), "extra": engine.extra_state()}
    engine.close()
    return found


def mean_of_means(case: Case, mesh: Mesh) -> Case:
    """The planted error: every rank divides by its own count, and the ranks are averaged."""
    engine = build(case, mesh)
    losses, norms = [], []
    for step in range(case["steps"]):
        batches, _ = microbatches(step, mesh)
        own = sum(b.counted() for b in batches)
        result = engine.train_step(batches, own * mesh.world, lr_of(step))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    engine.close()
    return {"loss": losses, "norm": norms}


def nan(case: Case, mesh: Mesh) -> Case:
    """Steps 0 and 1, a step 2 with a NaN in one microbatch of the last rank only, then steps 3 to 5."""
    engine = build(case, mesh)
    model: Any = engine.engine.module if hasattr(engine, "engine") else engine.model  # type: ignore[attr-defined]
    train(engine, range(2), mesh)
    before, extra = gathered(engine, mesh), engine.extra_state()
    calls = {"left": 1 if mesh.rank == mesh.world - 1 else 0}

    def poison(module: Any, arguments: Any, out: Any) -> Any:
        if not calls["left"]:
            return out
        calls["left"] -= 1
        return out._replace(objective=out.objective * float("nan"))

    hook = model.lm_head.register_forward_hook(poison)
    result = engine.train_step(*microbatches(2, mesh), lr_of(2))
    hook.remove()
    after = gathered(engine, mesh)
    found: Case = {
        "skipped": mesh.gather(result.skipped),
        "extra": [extra, engine.extra_state()],
        "unchanged": equal(before, after),
        **train(engine, range(3, 6), mesh),
        "tensors": gathered(engine, mesh),
    }
    engine.close()
    return found


def resume(case: Case, mesh: Mesh) -> Case:
    """Go on from logical tensors that another engine left. layout None: a reference engine on every rank."""
    start = torch.load(Path(case["folder"]) / f"{case['from']}.pt", weights_only=True)
    if case["config"].get("layout"):
        engine, share = build(case, mesh), mesh
    else:
        config = make_config(**case["config"])
        engine, share = ReferenceEngine(make_model(config), config), None
    fill(engine, start["tensors"], start["extra"])
    filled = gathered(engine, mesh) if share else assemble(local_boxes(engine))
    found: Case = train(engine, range(*case["steps"]), share)
    found["same"] = equal(start["tensors"], filled)
    found["tensors"] = gathered(engine, mesh) if share else assemble(local_boxes(engine))
    found["extra"] = engine.extra_state()
    engine.close()
    return found


def equal(one: Tensors, two: Tensors) -> bool:
    """Same names, same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


RUNS = {"plain": plain, "nan": nan, "resume": resume, "mean_of_means": mean_of_means}


def main(cases: Path, folder: Path) -> None:
    """Run every case in one world: start-up costs more than a case."""
    torch.set_num_threads(1)
    mesh = rendezvous(timeout_minutes=1.0)
    for case in json.loads(cases.read_text()):
        started = time.perf_counter()
        found = RUNS[case["run"]]({**case, "folder": str(folder)}, mesh)
        if mesh.first:
            torch.save(found, folder / f"{case['name']}.pt")
            print(f"{case['name']} {time.perf_counter() - started:.1f} s", flush=True)
        mesh.barrier()
    mesh.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
