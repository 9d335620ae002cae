"""Saved in any layout, resumed in any other: the same curve; in the same layout, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bigtrain.engine.reference import ReferenceEngine
from tests.runs.engine_parts import STEPS, make_config, make_model, train
from tests.runs.layout_cases import MODELS
from tests.runs.parity import FP32, worst
from tests.runs.reshard_worker import MIDDLE
from tests.runs.worlds import run_world

pytestmark = pytest.mark.timeout(900)

MODEL: dict[str, Any] = MODELS["mqa"] | {"layers": 4, "tied": True}
"""101 words and 43 ffn columns, which no tensor size divides; one kv head, which tensor ranks share."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "zero0": (2, {"zero": 0}),
    "zero2-offload": (2, {"zero": 2, "offload": "optimizer"}),
    "1f1b": (2, {"pipeline": 2, "zero": 0, "split": [3, 1]}),
    "tensor-zero3": (4, {"tensor": 2, "zero": 3, "sequence": False}),
    "ulysses": (2, {"context": 2, "context_by": "ulysses", "zero": 1}),
    "zb": (2, {"pipeline": 2, "schedule": "interleaved-zb", "chunks": 2, "zero": 0}),
    "zero3": (2, {"zero": 3}),
    "gpipe": (2, {"pipeline": 2, "schedule": "gpipe", "zero": 1}),
    "context-zero2": (4, {"context": 2, "zero": 2, "recompute": "full"}),
    "interleaved": (2, {"pipeline": 2, "schedule": "interleaved", "chunks": 2, "zero": 1}),
    "zbv-tensor": (4, {"pipeline": 2, "tensor": 2, "schedule": "zbv", "chunks": 2, "zero": 1}),
}
NAMES = list(LAYOUTS)
PAIRS = [(a, NAMES[(i + step) % len(NAMES)]) for i, a in enumerate(NAMES) for step in (1, 7)]
"""Every layout is left twice and entered twice, each time from another one: 24 ordered pairs."""


def config_of(name: str) -> dict[str, Any]:
    """The arguments of make_config."""
    return {"model": MODEL, "layout": LAYOUTS[name][1]}


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, list[float]]]:
    """All jobs, those of one world size in one world; their curves by name."""
    for world in sorted({LAYOUTS[job["layout"]][0] for job in jobs}):
        mine = [job for job in jobs if LAYOUTS[job["layout"]][0] == world]
        path = folder / "jobs.json"
        path.write_text(json.dumps(mine))
        run_world(["-m", "tests.runs.reshard_worker", str(path), str(folder)], world, timeout=400)
    return {job["name"]: json.loads((folder / f"{job['name']}.json").read_text()) for job in jobs}


def test_any_layout_resumes_any_other(tmp_path: Path) -> None:
    config = make_config(model=MODEL)
    expected = train(ReferenceEngine(make_model(config), config), range(STEPS))
    expected = {key: values[MIDDLE:] for key, values in expected.items()}

    def job(do: str, layout: str, source: str) -> dict[str, Any]:
        checkpoints = str(tmp_path / source / "checkpoints")
        about = {"do": do, "layout": layout, "config": config_of(layout), "checkpoints": checkpoints}
        return about | {"name": f"{do}-{source}-{layout}"}

    saved = run_jobs([job("save", name, name) for name in NAMES], tmp_path)
    pairs = [*PAIRS, *((name, name) for name in NAMES)]
    resumed = run_jobs([job("resume", after, before) for before, after in pairs], tmp_path)

    assert {a for a, _ in PAIRS} == {b for _, b in PAIRS} == set(NAMES)
    assert len(set(PAIRS)) >= 24
    wrong = {
        (before, after, key): error
        for before, after in pairs
        for key in ("loss", "norm")
        if not (error := worst(resumed[f"resume-{before}-{after}"][key], expected[key])) <= FP32
    }
    assert not wrong
    for name in NAMES:
        assert resumed[f"resume-{name}-{name}"] == saved[f"save-{name}-{name}"], f"{name}: not to the bit"
