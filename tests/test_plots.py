"""Pictures are drawn from what a run recorded, with axes that say what they are."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bigtrain.errors import UserError
from bigtrain.metrics import EvalRecord, to_json
from bigtrain.plots import loss_curve, lr_find_curve, smoothed
from tests.test_console import RECORD


def recorded(run: Path, steps: int = 300, *, evaluations: bool = True) -> Path:
    run.mkdir()
    with (run / "metrics.jsonl").open("w") as f:
        for step in range(1, steps + 1):
            loss = 3 + 6 * math.exp(-step / 40) + 0.1 * math.sin(step) if step != 100 else math.nan
            record = replace(RECORD, step=step, loss=loss, tokens=4096 * step, lr=1e-3 * step / steps)
            f.write(to_json(record))
            if evaluations and step % 100 == 0:
                f.write(to_json(EvalRecord(step, loss + 0.2, 30.0, 1.5, 100, 0.0)))
        f.write('{"kind": "step", "step": 301, "lo')  # a run that is being written
    return run


def size(png: Path) -> tuple[int, int]:
    """Width and height in pixels, from the PNG header."""
    raw = png.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(raw[16:20]), int.from_bytes(raw[20:24])


def inked(png: Path) -> float:
    """Share of pixels that are neither white nor grey: the curves."""
    from matplotlib.image import imread

    pixels = imread(png)[..., :3]
    return float(((pixels.max(-1) - pixels.min(-1)) > 0.2).mean())


def test_a_loss_curve_is_drawn(tmp_path: Path) -> None:
    run = recorded(tmp_path / "a")
    with_evaluations = loss_curve([run], tmp_path / "plots" / "loss.png")
    assert size(with_evaluations) == (1125, 840)
    assert 0.002 < inked(with_evaluations) < 0.2
    without = loss_curve([recorded(tmp_path / "b", evaluations=False)], tmp_path / "b.png")
    assert inked(without) < inked(with_evaluations)
    both = loss_curve([run, tmp_path / "b"], tmp_path / "both.png", title="Two runs")
    assert inked(both) > inked(without)


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    assert size(loss_curve([recorded(tmp_path / "a", steps=1)], tmp_path / "x.png")) == (1125, 840)


def test_a_run_without_steps_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no steps are recorded"):
        loss_curve([tmp_path / "empty"], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_learning_rate_test_is_drawn(tmp_path: Path) -> None:
    lrs = [1e-6 * 10 ** (i / 20) for i in range(100)]
    losses = [7 - 2 / (1 + 1e-3 / lr) + 50 * lr for lr in lrs]
    png = lr_find_curve(lrs, losses, 2e-3, tmp_path / "lr.png")
    assert size(png) == (1125, 660)
    assert inked(png) > 0.002


def test_smoothing_neither_lags_nor_leaves_the_data() -> None:
    line = [float(i) for i in range(100)]
    assert smoothed(line, 5) == pytest.approx(line), "a straight line stays one, to both ends"
    noise = [3.0 + (-1) ** i for i in range(101)]
    assert all(abs(v - 3) < 0.1 for v in smoothed(noise, 10)[10:-10])
    assert smoothed([2.0], 5) == [2.0]
    assert smoothed([], 5) == []


def test_matplotlib_is_imported_when_drawing_only() -> None:
    program = "import sys, bigtrain.plots\nassert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
