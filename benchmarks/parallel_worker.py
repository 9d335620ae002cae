"""What every rank of a world of `parallel.py` does: python parallel_worker.py PART CASES.json OUT.json."""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import traffic
from storages import Storages
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from bigtrain.config import Config
from bigtrain.engine import make_engine
from bigtrain.grid import grid_of
from bigtrain.mesh import Mesh, build_axes, rendezvous
from bigtrain.model.batch import Batch
from bigtrain.model.build import build_model
from bigtrain.parallel import context
from bigtrain.parallel.apply import lay

Case = dict[str, Any]


def told(formula: int, measured: int) -> int:
    """The calls that the formula tells, or those measured where it tells only bytes."""
    return measured if formula >= traffic.UNCOUNTED else formula


def config_of(case: Case) -> Config:
    """The whole config of a case in this world."""
    layout = case["layout"]
    data = int(os.environ.get("WORLD_SIZE", "1"))
    for axis in ("tensor", "pipeline", "context"):
        data //= layout.get(axis, 1)
    return Config.model_validate(
        {
            "name": "parallel",
            "model": case["model"],
            "data": {"path": "none", "sequence_length": case["sequence"]},
            "train": {
                "steps": 4,
                "global_batch": case["batch"] * case["microbatches"] * data,
                "microbatch": case["batch"],
                "precision": "fp32",
            },
            "optim": {"clip": 1.0, "lr": 1e-3},
            "layout": layout,
        }
    )


def meta_model(config: Config) -> torch.nn.Module:
    """The whole model, shapes only."""
    return build_model(
        config.model,
        config.loss,
        recompute=config.layout.recompute,
        device="meta",
        seed=config.train.seed,
    )


def batches(case: Case, mesh: Mesh, step: int) -> tuple[list[Batch], int]:
    """This rank's microbatches, whole rows of one document each, and the tokens of all ranks."""
    B, S, m = case["batch"], case["sequence"], case["microbatches"]
    found = []
    for i in range(m):
        number = (step * m + i) * mesh.data_size + mesh.data_rank
        g = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, case["model"]["vocab_size"], (B, S + 1), generator=g)
        ids = torch.arange(number * B, (number + 1) * B)
        found.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, ids))
    return found, B * S * m * mesh.data_size


def communication(case: Case, mesh: Mesh) -> Case:
    """What one step sends, on every rank, and what the formulas say."""
    config = config_of(case)
    about = traffic.describe(lay(meta_model(config), config, mesh))
    engine = make_engine(meta_model(config), config, mesh)
    for step in range(2):
        counter = traffic.Counter()
        micro, counted = batches(case, mesh, step)
        with counter:
            engine.train_step(micro, counted, 1e-3)
    engine.close()
    shape = case["batch"], case["sequence"], case["microbatches"]
    terms = traffic.expected(config, mesh, about, shape)
    found, formula = traffic.measured(counter, mesh), traffic.totals_of(terms)
    rows = [
        {
            "axis": axis,
            "op": op,
            "calls": found.get((axis, op), (0, 0.0))[0],
            "bytes": found.get((axis, op), (0, 0.0))[1],
            "formula_calls": told(formula.get((axis, op), (0, 0.0))[0], found.get((axis, op), (0, 0.0))[0]),
            "formula_bytes": formula.get((axis, op), (0, 0.0))[1],
            "fewer_at_most": sum(t.fewer for t in terms if (t.axis, t.op) == (axis, op)),
        }
        for axis, op in sorted({*found, *formula})
    ]
    return {"rows": rows, "terms": [t._asdict() for t in terms], "elements": sum(about["elements"])}


def memory(case: Case, mesh: Mesh) -> Case:
    """Bytes of live tensor storage after a step, and most of them during the next."""
    config = config_of(case)
    with Storages() as storages:
        engine = make_engine(meta_model(config), config, mesh)
        for step in range(2):
            micro, counted = batches(case, mesh, step)
            gc.collect()
            storages.restart()
            engine.train_step(micro, counted, 1e-3)
        del micro
        gc.collect()
        found = {"static": storages.live, "peak": storages.peak}
    engine.close()
    return found


def lower_right(*size: int) -> Any:
    """torch's bias object, which cannot be made while a dispatch mode watches (2.13: it is cast to a subclass)."""
    with _disable_current_modes():
        return causal_lower_right(*size)


def main() -> None:
    """All cases of a part in one world; rank 0 writes what every rank found."""
    part, cases, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    if part != "throughput":
        context.causal_lower_right = lower_right
    world = rendezvous(timeout_minutes=2.0)
    results = []
    for case in cases:
        grid = grid_of(config_of(case), world.world)
        mesh = replace(world, grid=grid, axes=build_axes(grid, world.rank)) if world.world > 1 else world
        if part == "throughput":
            from parallel_peers import throughput

            work: Any = throughput
        else:
            work = {"communication": communication, "memory": memory}[part]
        ranks = world.gather(work(case, mesh))
        results.append({"name": case["name"], "ranks": ranks})
        if world.first:
            print(case["name"], flush=True)
            out.write_text(json.dumps(results))
        gc.collect()
    world.close()


if __name__ == "__main__":
    main()
