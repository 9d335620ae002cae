"""What every rank of a data-parallel world runs to see that a refused step changes nothing.

python -m tests.runs.refuse_worker CASES, a list of `make_config`'s arguments as JSON; rank 0 prints a line for each.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from bigtrain.engine import make_engine
from bigtrain.mesh import Mesh, rendezvous
from tests.runs.engine_parts import gathered, lr_of, make_config, make_model, microbatches, train
from tests.runs.zero_worker import equal


def outcome(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Steps 0 and 1, a step 2 that is refused, steps 3 to 5; then the same without step 2, by another engine."""
    config = make_config(**case)
    engine = make_engine(make_model(config, mesh.device), config, mesh)
    train(engine, range(2), mesh)
    before, asked = gathered(engine, mesh), []

    def refuse(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return True

    result = engine.train_step(*microbatches(2, mesh), lr_of(2), refuse)
    unchanged = equal(before, gathered(engine, mesh))
    rest, end, extra = train(engine, range(3, 6), mesh), gathered(engine, mesh), engine.extra_state()
    engine.close()
    twin = make_engine(make_model(config, mesh.device), config, mesh)
    train(twin, range(2), mesh)
    honest = train(twin, range(3, 6), mesh)
    same_end = equal(end, gathered(twin, mesh))
    twin.close()
    return {
        "asked": mesh.gather(asked),
        "told": mesh.gather((result.loss, result.grad_norm)),
        "skipped": mesh.gather(result.skipped),
        "unchanged": unchanged,
        "same": rest == honest and same_end,
        "updates": extra["updates"],
        "scaler": extra["loss_scaler"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = rendezvous(timeout_minutes=1.0)
    for one in json.loads(sys.argv[1]):
        found = outcome(one, world)
        if world.first:
            print("found " + json.dumps(found), flush=True)
    world.close()
