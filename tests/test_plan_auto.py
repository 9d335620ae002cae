"""`layout = "auto"`: the same on every rank, kept on resuming, refused where nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import Config, LayoutConfig
from bigtrain.configfile import load, render
from bigtrain.errors import UserError
from bigtrain.grid import grid_of
from bigtrain.place import Place
from bigtrain.plan import auto
from bigtrain.plan.auto import choose
from bigtrain.plan.hardware import find_gpu
from bigtrain.plan.search import base_job, with_layout
from tests.test_config import small


def place(rank: int, world: int, local: int = 8) -> Place:
    return Place(rank, world, rank % local, min(local, world), "test")


def big(**changes: Any) -> Config:
    model = {"vocab_size": 32000, "layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "max_length": 2048}
    train = {"global_batch": 48, "microbatch": 1}
    return small(model=model, train=train, data={"sequence_length": 512}, **changes)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_gpu", lambda: find_gpu("NVIDIA H100 80GB HBM3"))


@pytest.mark.parametrize("world", [2, 6, 16])
def test_every_rank_chooses_the_same(world: int, tmp_path: Path) -> None:
    chosen = [choose(big(), place(rank, world), tmp_path) for rank in range(world)]
    assert len({render(config) for config, _ in chosen}) == 1
    config, note = chosen[0]
    assert grid_of(config, world).world == world
    assert f"{world} x CPU" in note


def test_one_cpu_process_keeps_the_defaults(tmp_path: Path) -> None:
    config, note = choose(big(), place(0, 1), tmp_path)
    assert config == big()
    assert "one process" in note


def test_gpus_are_named_and_given_what_fits(h100: None, tmp_path: Path) -> None:
    config, note = choose(big(), place(0, 8), tmp_path)
    assert "8 x h100" in note
    assert "a step planned" in note
    grid_of(config, 8)


def test_a_layout_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_card = replace(find_gpu("h100"), memory_gib=0.5)
    monkeypatch.setattr(auto, "_gpu", lambda: small_card)
    with pytest.raises(UserError, match="no layout fits 2 x h100"):
        choose(big(), place(0, 2), tmp_path)


def attempted(run: Path, config: Config, world: int) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.toml").write_text(render(config))
    (run / "provenance.json").write_text(json.dumps({"attempts": [{"world": world}]}))


def test_a_resumed_run_keeps_its_layout_while_the_world_is_the_same(tmp_path: Path) -> None:
    chosen, _ = choose(big(), place(0, 6), tmp_path)
    other = big(layout={"zero": 0, "recompute": "full"})
    assert other.layout != chosen.layout
    attempted(tmp_path, other, 6)
    kept, note = choose(big(), place(3, 6), tmp_path)
    assert kept.layout == other.layout
    assert "as in the last attempt on 6 ranks" in note
    assert choose(big(), place(0, 6), tmp_path, fresh=True)[0] == chosen
    assert choose(big(), place(0, 2), tmp_path)[0].layout != other.layout


def test_a_former_layout_that_no_longer_works_is_not_kept(tmp_path: Path) -> None:
    attempted(tmp_path, big(layout={"tensor": 3}), 6)  # heads do not divide by 3
    config, _ = choose(big(), place(0, 6), tmp_path)
    grid_of(config, 6)


def test_an_lstm_runs_as_it_is(tmp_path: Path) -> None:
    config = small(model={"kind": "lstm", "heads": None})
    assert choose(config, place(0, 2), tmp_path)[0] == config


def test_the_chosen_config_reads_back(tmp_path: Path) -> None:
    config, _ = choose(big(), place(0, 16), tmp_path)
    file = tmp_path / "config.toml"
    file.write_text(render(config))
    assert load(file) == config
    assert isinstance(config.layout, LayoutConfig)


def test_train_dry_prints_the_choice(tmp_path: Path) -> None:
    """As a user starts it, here as rank 0 of 4."""
    file = tmp_path / "auto.toml"
    text = render(big())
    file.write_text(
        'layout = "auto"\n' + text[: text.index("\n# How the work")] + text[text.index("\n# When to save") :]
    )
    env = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "PATH": ""}
    command = [sys.executable, "-m", "bigtrain", "train", str(file), "--dry"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("layout auto: ")
    assert "4 x CPU" in done.stdout


def test_engine_and_threads_stay() -> None:
    config = big(layout={"threads": 3, "kernels": "reference"})
    laid = with_layout(config, base_job(config))
    assert (laid.layout.threads, laid.layout.kernels) == (3, "reference")
