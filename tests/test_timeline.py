"""The picture of a pipeline's step, as a PNG and as text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.cli import main
from bigtrain.config import Config
from bigtrain.configfile import find_config, load
from bigtrain.errors import UserError
from bigtrain.parallel.schedule import orders, simulate
from bigtrain.timeline import draw_timeline, explain_schedule, timeline_text
from tests.test_plots import inked, size


def config(schedule: str, pipeline: int, chunks: int) -> Config:
    base = load(find_config("quickstart"))
    change = {"schedule": schedule, "pipeline": pipeline, "chunks": chunks}
    return base.model_copy(update={"layout": base.layout.model_copy(update=change)})


def test_text_of_a_small_step() -> None:
    timeline = simulate(orders("1f1b", 2, 1, 2), 1, 1, 1)
    assert timeline_text(timeline, width=29).splitlines() == [
        "rank 0 |F0 F1 ......B0    ...B1    |",
        "rank 1 |...F0 B0    F1 B1    ......|",
    ]
    assert timeline_text(timeline, width=9).splitlines() == ["rank 0 |FF..BB.BB|", "rank 1 |.FBBFBB..|"]


def test_text_tells_chunks_apart_and_squeezes() -> None:
    timeline = simulate(orders("zbv", 2, 2, 3), 1, 1, 1)
    rows = timeline_text(timeline, width=25).splitlines()
    assert rows[0].startswith("rank 0 |FFFfiw")
    assert rows[1].startswith("rank 1 |.FfFfiwFIW")
    long = timeline_text(simulate(orders("interleaved", 12, 2, 64), 1, 1, 1), width=80).splitlines()
    assert {len(row) for row in long} == {len("rank 11 ||") + 80}
    assert long[-1].startswith("rank 11 |.")


@pytest.mark.parametrize(
    ("schedule", "pipeline", "chunks", "microbatches"),
    [
        ("interleaved", 4, 2, 9),
        ("zbv", 16, 2, 64),
    ],
)
def test_a_step_is_drawn(
    schedule: str, pipeline: int, chunks: int, microbatches: int, tmp_path: Path
) -> None:
    timeline = simulate(orders(schedule, pipeline, chunks, microbatches), 1, 1, 1)
    png = draw_timeline(timeline, tmp_path / "plots" / "step.png", f"{schedule} {pipeline}")
    width, height = size(png)
    assert 1350 <= width <= 3000
    assert 300 <= height <= 1500
    assert inked(png) > 0.1


def test_bubbles_are_seen(tmp_path: Path) -> None:
    """The same ranks with more microbatches: less of the picture is idle."""
    few, many = (
        inked(draw_timeline(simulate(orders("gpipe", 2, 1, m), 1, 1, 1), tmp_path / f"{m}.png", ""))
        for m in (1, 8)
    )
    assert many > 1.2 * few


def test_explain_says_what_the_schedule_costs(tmp_path: Path) -> None:
    text = explain_schedule(config("1f1b", 4, 1), tmp_path / "x.png", microbatches=8)
    assert "1f1b: p = 4, v = 1, m = 8; bubble 37.5% (formula 37.5%)" in text
    assert "rank 3 |.........F0 B0    F1" in text
    assert "  4 3 2 1 / 4 3 2 1" in text
    assert text.endswith(f"drawn in {tmp_path / 'x.png'}")
    assert size(tmp_path / "x.png")[0] > 1000
    zb = explain_schedule(config("interleaved-zb", 4, 2), None, microbatches=8)
    assert "bubble 6.2% (formula 6.2%)" in zb
    assert "8 7 6 5 / 8 8 8 8" in zb
    assert "drawn" not in zb


def test_explain_of_few_microbatches_and_uneven_chunks() -> None:
    few = explain_schedule(config("zbv", 4, 2), None, microbatches=3)
    assert "bubble 44.4% (formula 16.7%, from m = 7 on)" in few
    uneven = explain_schedule(config("1f1b", 2, 1), None, microbatches=4, costs=[3.0, 6.0])
    assert "bubble 12.5% (formula 25.0%, with even chunks)" in uneven
    assert "  50% 100%" in uneven


def test_without_a_pipeline_there_is_nothing_to_draw() -> None:
    with pytest.raises(
        UserError, match=r"layout\.pipeline: there is no pipeline.*\n.*set layout\.pipeline = 2"
    ):
        explain_schedule(config("1f1b", 1, 1), None, microbatches=8)


def test_matplotlib_is_imported_when_drawing_only() -> None:
    program = "import sys, bigtrain.timeline\nassert not {'matplotlib', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_inspect_draws_the_schedule_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    layout = ["--set", "layout.pipeline=4", "--set", "layout.schedule=zbv", "--set", "layout.chunks=2"]
    assert main(["inspect", "llama-1b", "--schedule", *layout, "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    assert "zbv: p = 4" in said
    assert "rank 3 |" in said
    assert "drawn with 16 microbatches; a step has" in said
    assert main(["inspect", "llama-1b", "--schedule"]) == 2
    assert "layout.pipeline" in capsys.readouterr().err


def test_inspect_explains_the_layout_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "llama-8b", "--set", "layout.pipeline=4", "--set", "layout.tensor=8"]) == 0
    said = capsys.readouterr().out
    assert "pipeline 4 x tensor 8: 32 ranks" in said
    assert "layers a piece: 9, 9, 8, 6" in said
