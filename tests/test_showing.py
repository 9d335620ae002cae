"""`bigtrain data show`: the documents of a step, as the loader reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.budget import BatchSchedule, Progress, rank_samples
from bigtrain.cli import main
from bigtrain.configfile import render
from bigtrain.data.loader import Loader
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError
from bigtrain.run_data import samples_of
from bigtrain.showing import Reading
from tests.data_parts import small_tokenizer
from tests.test_run_data import config, folder  # noqa: F401 - a fixture


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:  # noqa: F811
    made = config(
        folder,
        skip=[[20, 27]],
        stages={"long": {"sample": 48, "weights": {"books": 1.0, "web": 1.0}, "sequence_length": 32}},
    )
    (tmp_path / "a.toml").write_text(render(made))
    return tmp_path / "a.toml"


def test_the_documents_are_what_the_loader_reads(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reading = Reading.of(str(file))
    samples, schedule = samples_of(reading.config), BatchSchedule.of(reading.config)
    loader, tokenizer = Loader(samples, seed=1), Tokenizer.load(small_tokenizer().path)
    plan = rank_samples(
        schedule, Progress(), 10, microbatch=8, data_rank=0, data_size=1, left_out=reading.left_out
    )
    for step, (expected,) in enumerate(plan, 1):
        assert reading.samples_of_step(step) == expected
        assert main(["data", "show", str(file), "--step", str(step), "--json", "--text", "100000"]) == 0
        shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [each["sample"] for each in shown] == expected
        tokens = loader.batch(expected).tokens
        for row, each in zip(tokens, shown, strict=True):
            assert sum(d["tokens"] for d in each["documents"]) == len(row)
            ends = [i + 1 for i, t in enumerate(row.tolist()) if t == tokenizer.eos_id]
            pieces = [row[a:b] for a, b in zip([0, *ends], [*ends, len(row)], strict=True) if a < b]
            assert [d["text"] for d in each["documents"]] == [tokenizer.decode(p.numpy()) for p in pieces]


def test_for_people(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(file), "--step", "7"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 7: 8 sequences of 32 tokens\nsample ")
    assert "train-00000.bin document " in out
    assert "books, epoch 0, window " in out
    assert main(["data", "show", str(file), "--sample", "10000000000"]) == 0
    assert "sample 10000000000" in capsys.readouterr().out


def test_a_run_knows_its_rollbacks_and_its_former_batches(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(file.read_text())
    steps = [{"kind": "step", "step": s, "samples": 4 * s, "tokens": 64 * s} for s in (1, 2, 3)]
    rolled = {"kind": "event", "step": 3, "name": "rollback", "data": {"first_sample": 30, "last_sample": 33}}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*steps, rolled]))
    reading = Reading.of(str(run))
    assert reading.samples_of_step(2) == [4, 5, 6, 7], "the batch was smaller then"
    assert reading.samples_of_step(4) == list(range(12, 20))
    assert reading.samples_of_step(5) == [28, 29, *range(34, 40)]


def test_what_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="steps 1 to 10, not 11"):
        Reading.of(str(file)).samples_of_step(11)
    for arguments, text in (
        ([], "--step N, or --sample G"),
        (["--step", "0"], "steps 1 to 10"),
        (["--step", "1", "--sample", "2"], "give a step or samples"),
        (["--sample", "-3"], "0 or more"),
    ):
        assert main(["data", "show", str(file), *arguments]) == 2
        assert text in capsys.readouterr().err
