"""Pictures of a plan are drawn, with what they should show."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.cli import main
from bigtrain.configfile import find_config, load
from bigtrain.plan.estimate import estimate
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import job_of
from bigtrain.plan.pictures import draw_all, draw_memory, draw_pipeline, scaling
from tests.test_plots import inked, size

PIPELINE = [
    "layout.pipeline=8",
    "layout.tensor=4",
    "layout.zero=1",
    "layout.schedule=interleaved",
    "layout.chunks=2",
]


def test_all_pictures_of_a_pipeline(tmp_path: Path) -> None:
    config = load(find_config("llama-8b"), PIPELINE)
    e = estimate(config, job_of(config, 64), cluster_of("h100", 64))
    drawn = draw_all(e, tmp_path / "plots")
    assert [path.name for path in drawn] == ["memory.png", "timeline.png", "scaling.png"]
    for path in drawn:
        width, height = size(path)
        assert 1000 < width <= 3000
        assert 400 < height < 2000
        assert inked(path) > 0.005


def test_more_stages_make_a_taller_picture_of_memory(tmp_path: Path) -> None:
    heights = []
    for stages in (2, 8):
        config = load(find_config("llama-8b"), ["layout.zero=1", f"layout.pipeline={stages}"])
        e = estimate(config, job_of(config, 16), cluster_of("h100", 16))
        heights.append(size(draw_memory(e, tmp_path / f"{stages}.png"))[1])
    assert heights[0] < heights[1]


def test_a_pipeline_with_many_microbatches_is_drawn_in_part(tmp_path: Path) -> None:
    config = load(find_config("llama-8b"), ["layout.pipeline=2", "layout.zero=1"])
    e = estimate(config, job_of(config, 2), cluster_of("h100", 2))
    assert e.job.microbatches == 512
    assert size(draw_pipeline(e, tmp_path / "t.png"))[0] <= 3000


def test_scaling_keeps_or_grows_the_batch() -> None:
    config, cluster = load(find_config("llama-8b")), cluster_of("h100", 64)
    strong, weak = (scaling(config, cluster, weak=w) for w in (False, True))
    assert {p.layout.job.global_batch for p in strong} == {512}
    for point in weak:
        assert point.layout.job.global_batch == 8 * point.gpus
        assert point.layout.job.ranks == point.gpus
    at = {p.gpus: p.speed for p in strong}
    assert at[64] == pytest.approx({p.gpus: p.speed for p in weak}[64])
    assert at[1024] / 1024 < at[64] / 64  # each GPU has less to do


def test_the_verb_draws_into_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2-124m", "--gpus", "8", "--pictures", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    for path in (tmp_path / "new" / "memory.png", tmp_path / "new" / "scaling.png"):
        assert path.is_file()
        assert f"drawn in {path}" in out
