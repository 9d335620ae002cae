"""Predicted against measured: what of a run counts, and what `bigtrain plan --calibrate` says and stores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cli import main
from bigtrain.config import Config
from bigtrain.configfile import find_config, load, render
from bigtrain.metrics import to_json
from bigtrain.plan.calibration import Shape, read
from bigtrain.plan.comparison import WARM_UP, beside_plan, measured
from bigtrain.plan.estimate import estimate
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import job_of
from bigtrain.plan.memory import memory_of
from bigtrain.plan.steptime import time_of
from tests.test_console import RECORD

STEP = 4194304
CONFIG = load(find_config("llama-8b"))


def records(seconds: list[float], *, pause_before: int = 0, size: int = STEP) -> list[dict[str, Any]]:
    """Steps that took so long; an hour's pause before one of them."""
    found, now = [], 1.8e9
    for step, took in enumerate(seconds, 1):
        now += took + 3600 * (step == pause_before)
        record = replace(
            RECORD, step=step, tokens=step * size, seconds=took, time=now, memory_bytes=50 * 2**30
        )
        found.append(json.loads(to_json(record)))
    return found


def written(
    run: Path, seconds: list[float], *, gpu: str | None = "NVIDIA H100 80GB HBM3", world: int = 64
) -> Path:
    run.mkdir()
    (run / "config.toml").write_text(render(CONFIG))
    hosts = [f"node{i}" for i in range(-(-world // 8))]
    hardware = {"cpu": "x"} | ({"gpu": gpu} if gpu else {})
    attempts = [{"world": world, "hosts": hosts, "hardware": hardware}]
    (run / "provenance.json").write_text(json.dumps({"attempts": attempts}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(seconds)))
    return run


def test_warm_up_restarts_and_other_batches_do_not_count() -> None:
    found = measured(records([60.0] * WARM_UP + [10.0, 12.0, 99.0, 11.0], pause_before=WARM_UP + 3), STEP)
    assert found is not None
    assert (found.seconds, found.steps, found.memory) == (11.0, 3, 50 * 2**30)
    assert measured(records([10.0] * 20), STEP // 2) is None
    assert measured(records([10.0] * WARM_UP), STEP) is None


def test_a_run_is_compared_and_its_correction_makes_the_next_plan_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster, job = cluster_of("h100", 64), job_of(CONFIG, 64)
    run = written(tmp_path / "run", [15.0] * 20)
    assert main(["plan", "--calibrate", str(run)]) == 0
    text = capsys.readouterr().out
    time = time_of(job, cluster)
    assert f"({15.0 / time.total - 1:+.1%}" in text
    (found,) = read(run / "calibration.toml").findings
    assert found.time_factor == pytest.approx(15.0 / time.total)
    assert (found.gpu, found.shape) == ("h100-80gb", Shape.of(job))
    first = memory_of(job)[0]
    assert found.memory_offset == pytest.approx(50 * 2**30 - (first.total - first.unseen))
    e = estimate(CONFIG, job, cluster, calibration=read(run / "calibration.toml"))
    assert e.step.point == pytest.approx(15.0)
    assert e.memory[0].point == pytest.approx(50 * 2**30 + first.unseen)
    assert e.speed.point == pytest.approx(STEP / 15.0 / 64)
    command = ["plan", "llama-8b", "--gpus", "64", "--json", "--calibration", str(run / "calibration.toml")]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["step_seconds"]["point"] == pytest.approx(15.0)


def test_several_runs_make_one_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(written(tmp_path / name, [seconds] * 20)) for name, seconds in (("a", 12.0), ("b", 15.0))]
    assert main(["plan", "--calibrate", *runs]) == 2
    assert "--out" in capsys.readouterr().err
    out = tmp_path / "measured.toml"
    assert main(["plan", "--calibrate", *runs, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("measured (median of") == 2
    assert f"--calibration {out}" in text
    total = time_of(job_of(CONFIG, 64), cluster_of("h100", 64)).total
    assert [f.time_factor * total for f in read(out).findings] == pytest.approx([12.0, 15.0])
    assert main(["plan", "llama-8b", "--gpus", "64", "--calibration", str(out)]) == 0
    assert "by 2 runs of these shapes" in capsys.readouterr().out


def test_at_the_end_of_a_run_on_known_gpus() -> None:
    text = beside_plan(CONFIG, "NVIDIA H100 80GB HBM3", 64, 8, records([15.0] * 20))
    assert text.startswith("step time")
    assert "15 s measured" in text
    assert "50 GiB measured" in text
    assert beside_plan(CONFIG, "Potato 3000", 64, 8, records([15.0] * 20)) == ""
    assert beside_plan(CONFIG, "NVIDIA H100 80GB HBM3", 64, 8, records([15.0] * 3)) == ""
    lstm: Config = load(find_config("lstm"))
    of_lstm = records([1.0] * 20, size=16 * 128)
    assert "1 s measured" in beside_plan(lstm, "NVIDIA H100 80GB HBM3", 1, 1, of_lstm)


def test_runs_that_tell_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "short": (written(tmp_path / "short", [15.0] * 3), "no full step after the first 5"),
        "cpu": (written(tmp_path / "cpu", [15.0] * 20, gpu=None), "ran on CPUs"),
        "odd": (written(tmp_path / "odd", [15.0] * 20, gpu="Potato 3000"), "Potato 3000"),
    }
    bare = written(tmp_path / "bare", [15.0] * 20)
    (bare / "provenance.json").write_text("{}")
    for run, words in [*cases.values(), (bare, "tells not where it ran")]:
        assert main(["plan", "--calibrate", str(run)]) == 2
        assert words in capsys.readouterr().err
