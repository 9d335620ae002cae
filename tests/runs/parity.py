"""Is a run in some layout the single process's run? One comparison, for the tests and for the whole grid."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from bigtrain.engine.reference import ReferenceEngine
from tests.runs.engine_parts import (
    assemble,
    local_boxes,
    make_config,
    make_model,
    sample,
    train,
)
from tests.runs.worlds import run_world

Case = dict[str, Any]
FP32 = 1e-5
"""Largest relative difference of a step's loss or gradient norm, and of the gradient of one parameter."""


REPLICAS = 20 * 2.0**-24
"""Largest difference between two ranks' copies of an fp32 weight: half an ulp of 1 a step. torch's AdamW on a CPU
treats the last elements of a flat buffer by other instructions, whose rounding differs; where ranks hold uneven
parts, a copy of the same weight may be among the last on one rank only (seen: 5e-10, two elements of a bias)."""


@functools.cache
def _reference(steps: int, sequences: tuple[int, ...], held_out: int, config: str) -> Case:
    made = make_config(**json.loads(config))
    engine = ReferenceEngine(make_model(made), made)
    found: Case = {"start": assemble(local_boxes(engine))}
    curves = train(engine, range(1), None, sequences)
    found["first"] = assemble(local_boxes(engine))
    for key, values in train(engine, range(1, steps), None, sequences).items():
        curves[key] += values
    found |= {"tensors": assemble(local_boxes(engine)), **curves}
    found["nll"] = sum(engine.evaluate([sample(n)]) for n in range(held_out))
    return found


def reference(case: Case) -> Case:
    """The same run in one process."""
    config = {key: value for key, value in case["config"].items() if key != "layout"}
    text = json.dumps(config, sort_keys=True)
    return _reference(case["steps"], tuple(case["sequences"]), case["held_out"], text)


def run_cases(cases: list[Case], world: int, folder: Path, *, timeout: float) -> dict[str, Case]:
    """Run all cases in one world; the outcome of each by name."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    run_world(["-m", "tests.runs.layout_worker", str(path), str(folder)], world, timeout=timeout)
    return {c["name"]: torch.load(folder / f"{c['name']}.pt", weights_only=True) for c in cases}


def worst(one: list[float], two: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, two, strict=True))


def differences(found: Case, expected: Case) -> dict[str, float]:
    """How far a run is from the reference, as relative errors by what was compared."""
    assert found["start"].keys() == expected["start"].keys() == found["tensors"].keys()
    masters = [key for key in expected["start"] if key.startswith("master/")]
    moments = {k: v for k, v in expected["first"].items() if k.startswith("exp_avg/")}
    whole = torch.stack([m.norm() for m in moments.values()]).norm()
    # A key's bias without rotary positions has no gradient but rounding, which Adam makes as large as any other.
    heard = [k for k in masters if moments["exp_avg/" + k[7:]].norm() > 1e-5 * whole]
    wrong = {k: (found["tensors"][k] - expected["tensors"][k]).norm() for k in heard}
    size = {k: expected["tensors"][k].norm() for k in heard}
    return {
        # Weights at step 0 are compared bit by bit: initialisation never depends on the layout.
        "start": float(any(not torch.equal(found["start"][k], expected["start"][k]) for k in masters)),
        "loss": worst(found["loss"], expected["loss"]),
        "norm": worst(found["norm"], expected["norm"]),
        # Adam's first moment after one step is 0.1 x the clipped gradient of each parameter.
        "gradients": max(
            float((found["first"][k] - m).norm() / torch.maximum(m.norm(), 1e-4 * whole))
            for k, m in moments.items()
        ),
        "weights": float(_norm(wrong) / _norm(size)),
        # The worst tensor's wrong share of what it has learned. Adam divides by the root of the second moment, which
        # magnifies rounding where gradients are small.
        "learned": max(
            float(e / (expected["tensors"][k] - expected["start"][k]).norm()) for k, e in wrong.items()
        ),
        "held out": abs(found["nll"] - expected["nll"]) / expected["nll"],
        "replicas apart": found["apart"],
    }


def _norm(norms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The norm of all tensors as one."""
    return torch.stack(list(norms.values())).norm()


BOUNDS = {
    "start": 0.0,
    "loss": FP32,
    "norm": FP32,
    "gradients": FP32,
    "learned": 30 * FP32,
    "weights": FP32,
    "held out": FP32,
    "replicas apart": REPLICAS,
}


def excess(errors: dict[str, float], bounds: dict[str, float] = BOUNDS) -> dict[str, float]:
    """Which comparisons fail."""
    return {key: errors[key] for key, bound in bounds.items() if not errors[key] <= bound}
