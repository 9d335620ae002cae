"""`layout = "auto"` in a whole run: chosen on all ranks, written down, kept on resuming, chosen again elsewhere."""

from __future__ import annotations

from pathlib import Path

from bigtrain.configfile import load
from bigtrain.grid import grid_of
from tests.runs.conftest import Tiny


def test_a_run_lays_itself_out(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = tiny.train(run, "layout=auto", "train.steps=4", processes=2)
    assert first.code == 0, first.err
    assert first.out.count("layout auto: ") == 1
    chosen = load(run / "config.toml")
    assert grid_of(chosen, 2).world == 2
    again = tiny.train(run, "layout=auto", "train.steps=6", processes=2)
    assert again.code == 0, again.err
    assert "as in the last attempt on 2 ranks" in again.out
    assert "resumed from step_00000004" in again.out
    assert load(run / "config.toml").layout == chosen.layout
    alone = tiny.train(run, "layout=auto", "train.steps=8")
    assert alone.code == 0, alone.err
    assert "one process, nothing to lay out" in alone.out
    assert "resumed from step_00000006" in alone.out
