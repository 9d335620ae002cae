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
from bigtrain.mesh import Mesh, rendezvous
from tests.runs.engine_parts import STEPS, fill, gathered, make_config, make_model, microbatches, train


def build(case: dict[str, Any], mesh: Mesh) -> Engine:
    """The case's engine on a fresh model."""
    config = make_config(**case["config"])
    return make_engine(make_model(config), config, mesh)


def plain(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Train, evaluate, and all logical tensors at the end."""
    engine = build(case, mesh)
    found = train(engine, range(case.get("steps", STEPS)), mesh)
    (nll,) = mesh.sum([engine.eval_step(b) for b in microbatches(5, mesh)[0]][:1])
    tensors = gathered(engine, mesh)
    extra = engine.extra_state()
    engine.close()
    return {**found, "nll": nll, "tensors": tensors, "extra": extra}


def nan(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A step with a NaN on the last rank only, between good ones."""
    engine = build(case, mesh)
    model = engine.model if hasattr(engine, "model") else engine.engine.module  # type: ignore[attr-defined]
    head = model.lm_head
    before = [train(engine, range(2), mesh), gathered(engine, mesh)]
    poison = {"left": 1}

    def poisoned(module: Any, arguments: Any, out: Any) -> Any:
        if mesh.rank != mesh.world - 1 or not poison["left"]:
            return out
        poison["left"] -= 1
        return out._replace(objective=out.objective * float("nan"))

    hook = head.register_forward_hook(poisoned)
    batches, counted = microbatches(2, mesh)
    result = engine.train_step(batches, counted, 1e-3)
    hook.remove()
    after = gathered(engine, mesh)
    more = train(engine, range(3, 6), mesh)
    found = {
        "skipped": [bool(x) for x in mesh.gather(result.skipped)],
        "extra_after": engine.extra_state(),
        "same": all(torch.equal(before[1][k], after[k]) for k in after),
        "after": more,
        "tensors": gathered(engine, mesh),
    }
    engine.close()
    return found


def resume(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Go on from logical tensors that another engine left, then take them out again."""
    engine = build(case, mesh)
    start = torch.load(case["from"], weights_only=True)
    fill(engine, start["tensors"], start["extra"])
    filled = gathered(engine, mesh)
    same = (
        all(torch.equal(filled[k], v) for k, v in start["tensors"].items())
        and filled.keys() == start["tensors"].keys()
    )
    found = train(engine, range(case["first"], case["last"]), mesh)
    tensors, extra = gathered(engine, mesh), engine.extra_state()
    engine.close()
    return {**found, "tensors": tensors, "extra": extra, "same": same}


def main(cases: Path, folder: Path) -> None:
    """Run every case in one world: start-up costs more than a case."""
    torch.set_num_threads(1)
    mesh = rendezvous(timeout_minutes=1.0)
    for case in json.loads(cases.read_text()):
        started = time.perf_counter()
        run = {"plain": plain, "nan": nan, "resume": resume}[case["run"]]
        found = run(case, mesh)
        found["seconds"] = time.perf_counter() - started
        if mesh.first:
            torch.save(found, folder / f"{case['name']}.pt")
        mesh.barrier()
    mesh.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
