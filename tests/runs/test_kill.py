"""kill -9 at ten random moments, resume each time: losses and final weights are those of the undisturbed run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs.conftest import Tiny, losses_of
from tests.runs.test_train import weights_of

pytestmark = [pytest.mark.runs, pytest.mark.timeout(400)]


def test_killed_ten_times_the_run_is_the_same_to_the_bit(tiny: Tiny, tmp_path: Path) -> None:
    settings = ["train.steps=400", "checkpoint.every_steps=7", "train.eval_every=50"]
    undisturbed = tmp_path / "undisturbed"
    assert tiny.train(undisturbed, *settings).code == 0
    run = tmp_path / "killed"
    sets = [part for setting in settings for part in ("--set", setting)]
    dice = random.Random(5)
    kills = 0
    for _ in range(10):
        process = subprocess.Popen(
            tiny.command("train", str(tiny.config), "--run-dir", str(run), *sets),
            env=tiny.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_a_new_step(run, process)
        # Anywhere in the next few steps: inside a step, a save, a rename, a metrics line.
        time.sleep(dice.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        kills += process.wait(timeout=30) == -signal.SIGKILL
    assert kills == 10, "the run ended before the last kill; make it longer"
    last = tiny.train(run, *settings)
    assert last.code == 0, last.err
    assert losses_of(run) == losses_of(undisturbed)
    assert evaluations(run) == evaluations(undisturbed)
    assert weights_of(run) == weights_of(undisturbed)


def evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every held-out evaluation."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "eval"]


def wait_for_a_new_step(run: Path, process: subprocess.Popen[str]) -> None:
    """Until this process has recorded a step of its own."""
    metrics = run / "metrics.jsonl"
    began, deadline = time.time(), time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.stat().st_mtime > began and b'"step"' in metrics.read_bytes()[-400:]:
            return
        time.sleep(0.01)
    raise AssertionError(f"no step within a minute: {process.communicate(timeout=5)[1]}")
