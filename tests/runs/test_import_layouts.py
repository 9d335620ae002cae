"""Weights from a directory in every kind of layout, and whole runs that start from an exported one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.exporting import export
from tests.foreign_parts import make_run, model_config, weights_of
from tests.runs.conftest import Tiny, losses_of
from tests.runs.parity import worst
from tests.runs.worlds import run_world

pytestmark = pytest.mark.runs

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2, "zero": 1},
    "pipeline": {"pipeline": 2, "zero": 0},
    "context": {"context": 2, "zero": 2},
    "zero3": {"zero": 3},
}


def test_every_layout_starts_with_the_same_weights(tmp_path: Path, s3: str) -> None:
    """From a file, shards, GPT-2's transposed and fused matrices, an object store, a checkpoint of two ranks."""
    cases: list[dict[str, Any]] = []
    for name in ("qwen3-window", "gpt2-untied"):  # tied: a pipeline has the embedding on both ends
        make_run(tmp_path / "run" / name, model_config(name))
        export(tmp_path / "run" / name, tmp_path / name, dtype="fp32", max_shard_bytes=30_000, compare=False)
        cases += [
            {"name": f"{name}-{key}", "path": name, "model": name, "layout": layout}
            for key, layout in LAYOUTS.items()
        ]
    export(tmp_path / "run" / "qwen3-window", s3, dtype="fp32", compare=False)
    cases.append({"name": "store", "path": s3, "model": "qwen3-window", "layout": LAYOUTS["tensor"]})
    sharded: dict[str, Any] = {"path": "dcp", "model": "llama"}
    cases.append({"name": "dcp-zero3", "dcp": True, "layout": LAYOUTS["zero3"], **sharded})
    cases.append({"name": "dcp-tensor", "layout": LAYOUTS["tensor"], "precision": "bf16", **sharded})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_world(["-m", "tests.runs.import_worker", str(tmp_path)], 2, timeout=200)
    for case in cases:
        found = torch.load(tmp_path / f"{case['name']}.pt")
        weights = weights_of(model_config(case["model"]))
        assert {n for n in found["tensors"] if n.startswith("master/")} == {f"master/{n}" for n in weights}
        for key, tensor in found["tensors"].items():
            kind, _, name = key.partition("/")
            expected = weights[name] if kind == "master" else torch.zeros(tensor.shape)
            assert torch.equal(tensor, expected), (case["name"], key)
        assert found["apart"] == 0, case["name"]
        assert "weights from" in found["notes"][0]


def test_a_rank_that_cannot_read_is_everyones_error(tmp_path: Path) -> None:
    make_run(tmp_path / "run", model_config("llama"))
    export(tmp_path / "run", tmp_path / "hf", compare=False)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"short")
    case = {"name": "x", "path": "hf", "model": "llama", "layout": LAYOUTS["tensor"]}
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    finished = run_world(
        ["-m", "tests.runs.import_worker", str(tmp_path)], 2, timeout=200, grace=60, check=False
    )
    for rank in finished:
        assert rank.code == 1
        assert "truncated or no safetensors file" in rank.stderr


def test_a_run_goes_on_from_an_exported_one_in_any_layout(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    """The first evaluation is the last one of the run that was exported; the curve does not know the layout."""
    done = tiny("export", str(whole), "--to", str(tmp_path / "hf"), "--dtype", "fp32", "--no-compare")
    assert done.code == 0, done.err
    config = tmp_path / "next.toml"
    done = tiny("import", str(tmp_path / "hf"), "--out", str(config), "--config", str(tiny.config))
    assert done.code == 0, done.err
    settings = ("train.steps=6", "train.eval_every=6", "checkpoint.every_steps=3", "optim.warmup_steps=2")
    sets = [part for setting in settings for part in ("--set", setting)]

    def train(name: str, *more: str, processes: int = 1) -> Path:
        done = tiny(
            "train",
            str(config),
            "--run-dir",
            str(tmp_path / name),
            *sets,
            *more,
            processes=processes,
            timeout=200,
        )
        assert done.code == 0, done.err
        return tmp_path / name

    alone = train("alone")
    first, last = (evaluations(run) for run in (alone, whole))
    assert first[0]["step"] == 0
    assert first[0]["loss"] == pytest.approx(last[-1]["loss"], rel=1e-6)
    together = train("together", "--set", "layout.tensor=2", "--set", "layout.zero=1", processes=2)
    assert worst(losses_of(together), losses_of(alone)) <= 1e-5
    shutil.rmtree(tmp_path / "hf")
    again = tiny("train", str(config), "--run-dir", str(alone), *sets, "--set", "train.steps=7")
    assert again.code == 0, "a run that has a checkpoint does not ask for the directory again" + again.err
    gone = tiny("train", str(config), "--run-dir", str(tmp_path / "gone"), *sets)
    assert gone.code == 2
    assert "holds neither model.safetensors" in gone.err


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The records of held-out evaluations."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "eval"]
