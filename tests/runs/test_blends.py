"""Whole runs over several sources, in stages that change weights and length: the same curve in any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.data.prepare import PrepareOptions, prepare
from tests.runs.conftest import Tiny, losses_of, steps_of
from tests.runs.parity import worst
from tests.runs.worlds import ROOT

pytestmark = pytest.mark.runs

FP32 = 1e-5


@pytest.fixture(scope="module")
def blended(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, list[float], Path]:
    """The tiny config over two corpora in two stages, and the run of one process."""
    folder = tmp_path_factory.mktemp("blended")
    docs = folder / "docs"
    prepare(
        PrepareOptions(
            (str(ROOT / "README.md"), str(ROOT / "CONTRIBUTING.md"), str(ROOT / "docs")),
            docs,
            tokenizer=tiny.data,
            validation_fraction=0.2,
        )
    )
    text = tiny.config.read_text().replace(f'path = "{tiny.data}"\n', "")
    text = text.replace("steps = 30", "steps = 12").replace("eval_every = 10", "eval_every = 6")
    text = text.replace("warmup_steps = 3", 'warmup_steps = 3\nschedule = "constant"')
    text += f'''
[data.sources.code]
path = "{tiny.data}"
weight = 3.0
[data.sources.docs]
path = "{docs}"
[data.stages.long]
sample = 48
weights = {{ code = 1.0, docs = 1.0 }}
sequence_length = 64
'''
    config = folder / "blended.toml"
    config.write_text(text)
    made = Tiny(config, tiny.data)
    done = made.train(folder / "run")
    assert done.code == 0, done.err
    assert "the steps to come read code 0." in done.err + done.out
    steps = steps_of(folder / "run")
    assert [steps[s]["tokens"] for s in (5, 6, 7, 12)] == [5 * 256, 6 * 256, 6 * 256 + 512, 6 * 256 + 6 * 512]
    return made, losses_of(folder / "run"), folder / "run"


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, ["layout.zero=1"]),
        (2, ["layout.tensor=2"]),
        (4, ["layout.pipeline=2", "layout.context=2"]),
    ],
)
def test_any_layout_has_the_curve_of_one_process(
    blended: tuple[Tiny, list[float], Path], processes: int, settings: list[str], tmp_path: Path
) -> None:
    made, losses, _ = blended
    done = made.train(tmp_path / "run", *settings, processes=processes)
    assert done.code == 0, done.err
    assert worst(losses_of(tmp_path / "run"), losses) <= FP32


def test_a_stage_and_a_source_added_while_the_run_goes_on(
    blended: tuple[Tiny, list[float], Path], tmp_path: Path
) -> None:
    made, losses, _ = blended
    run, base = tmp_path / "run", made.config.read_text()
    first = tmp_path / "first.toml"
    first.write_text(base[: base.index("[data.stages.long]")])
    done = Tiny(first, made.data).train(run, "train.steps=5")
    assert done.code == 0, done.err
    changed = Tiny(made.config, made.data).train(run)
    assert changed.code == 0, changed.err
    assert losses_of(run) == losses
    late = tmp_path / "late.toml"
    late.write_text(base.replace("weight = 3.0", "weight = 2.0"))
    refused = Tiny(late, made.data).train(run, "train.steps=20")
    assert refused.code == 2
    assert "data.stages before sample 96" in refused.err, refused.err


def test_what_a_step_read_is_shown(blended: tuple[Tiny, list[float], Path]) -> None:
    made, _, run = blended
    shown = made("data", "show", str(run), "--step", "9", "--json")
    assert shown.code == 0, shown.err
    samples = [json.loads(line) for line in shown.out.splitlines()]
    assert [s["sample"] for s in samples] == list(range(64, 72))
    assert {s["source"] for s in samples} == {"code", "docs"}
    assert all(sum(d["tokens"] for d in s["documents"]) == 64 for s in samples)
