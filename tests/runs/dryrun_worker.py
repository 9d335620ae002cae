"""What every rank of a real gloo world does to hold the dry run against: measure the same steps on real tensors.

python -m tests.runs.dryrun_worker CASES.json FOLDER
"""

from __future__ import annotations

import json
import pickle
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from bigtrain.config import Config
from bigtrain.mesh import Mesh, rendezvous
from bigtrain.model import init
from bigtrain.parallel import context
from bigtrain.plan.fakeworld import outside_of_modes
from bigtrain.plan.measuring import Measured, measure
from bigtrain.plan.oplog import Compute
from bigtrain.plan.storages import by_kind
from tests.runs.engine_parts import TRANSFORMER, make_config
from tests.runs.layout_worker import laid_over, names_of_its_own

Case = dict[str, Any]


def config_of(case: Case) -> Config:
    """A tiny model; what the case says of layout, precision, model and loss."""
    layout = case["layout"]
    layers = max(2, layout.get("pipeline", 1) * layout.get("chunks", 1))
    model = TRANSFORMER | {"layers": layers, "tied": case.get("tied", True), **case.get("model", {})}
    # Not clipped: whether DeepSpeed scales gradients hangs on a number that a dry run does not have.
    optim = {"clip": 1e9}
    return make_config(model=model, optim=optim, layout=layout, precision=case.get("precision", "fp32"))


def facts(run: Measured) -> dict[str, Any]:
    """All that must be equal in a dry run, to the byte."""
    return {
        "setup": run.setup,
        "static": run.static,
        **{
            f"step {number} {name}": value
            for number, step in enumerate(run.steps)
            for name, value in {
                "peak": step.peak,
                "kinds": by_kind(step.held),
                "held": [(h.size, h.shape, str(h.dtype), h.kind, h.where) for h in step.held],
                "flops": step.work.flops,
                "recomputed": step.work.again,
                "operations": Counter(
                    i.op for i in map(run.table.__getitem__, step.log) if isinstance(i, Compute)
                ),
                "traffic": step.work.traffic,
            }.items()
        },
    }


def filled_outside(*args: Any, **kwargs: Any) -> None:
    """Initial values as always, without what making them holds for a moment: the dry run leaves them out."""
    with _disable_current_modes():
        FILL(*args, **kwargs)


def waited_outside(work: dist.Work, *args: Any) -> Any:
    """gloo makes a reduce-scatter of an all-reduce and a copy, the latter when it is waited for: no step's work.

    Its thread lets go of the tensors a moment after the wait is over.
    """
    with _disable_current_modes():
        done = WAIT(work, *args)
    time.sleep(0.002)
    return done


FILL, WAIT = init.fill_box, dist.Work.wait


def run(case: Case, world: Mesh) -> dict[str, Any]:
    """One case on this rank."""
    config = config_of(case)
    with (
        laid_over(config, world) as mesh,
        mock.patch.object(init, "fill_box", filled_outside),
        mock.patch.object(dist.Work, "wait", waited_outside),
        mock.patch.object(context, "causal_lower_right", outside_of_modes),
    ):
        return facts(measure(config, mesh, case["counts"]))


def main(cases: Path, folder: Path) -> None:
    """Every case, in one world."""
    torch.set_num_threads(1)
    world = rendezvous(timeout_minutes=1.0)
    found = []
    for number, case in enumerate(json.loads(cases.read_text())):
        try:
            with names_of_its_own(number):
                found.append(run(case, world))
        except Exception:
            print(f"case {case['name']} on rank {world.rank}", flush=True)
            traceback.print_exc()
            sys.exit(1)
    (folder / f"{world.rank}.pickle").write_bytes(pickle.dumps(found))
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
