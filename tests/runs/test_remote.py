"""A run whose checkpoints lie in an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.checkpoint import store
from bigtrain.exporting import export
from tests.runs.conftest import Tiny, losses_of


@pytest.mark.runs
def test_a_whole_run_saves_to_the_store_and_goes_on_from_there(s3: str, tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [f"checkpoint.folder={s3}", "optim.schedule=constant", "train.eval_every=0"]
    for steps, processes in ((4, 2), (8, 1)):
        done = tiny.train(run, *settings, f"train.steps={steps}", processes=processes)
        assert done.code == 0, done.err
    assert "resumed from step_00000004" in done.out
    assert f"in {s3}" in done.out
    assert len(losses_of(run)) == 8
    assert not (run / "checkpoints").exists()
    assert [p.name for p in store.list_checkpoints(s3)] == [f"step_0000000{step}" for step in (4, 5, 8)]
    assert tiny("inspect", str(run), "--verify").out.count("health      sound") == 3
    assert tiny("generate", str(run), "--max-new-tokens", "4").code == 0
    refused = tiny("generate", f"{s3}/step_00000008")
    assert refused.code == 2
    assert "give the run directory" in refused.err
    url = s3.replace("checkpoints", "model")
    export(run, url, dtype="fp32", compare=False)
    done = tiny.train(tmp_path / "next", f"train.init_from={url}", "train.steps=3")
    assert done.code == 0, done.err
    assert f"weights from {url}" in done.out + done.err
    assert losses_of(tmp_path / "next")[0] < losses_of(run)[0]


@pytest.mark.runs
def test_a_run_reads_its_corpus_from_the_store(s3: str, tiny: Tiny, tmp_path: Path) -> None:
    import s3fs

    for file in tiny.data.iterdir():
        s3fs.S3FileSystem().put_file(str(file), f"{s3}/{file.name}")
    settings = ["train.steps=3", "train.eval_every=0", f"data.cache={tmp_path / 'cache'}"]
    there = tiny.train(tmp_path / "there", f"data.path={s3}", *settings, processes=2)
    assert there.code == 0, there.err
    here = tiny.train(tmp_path / "here", *settings, processes=2)
    assert losses_of(tmp_path / "there") == losses_of(tmp_path / "here"), here.err
    copies = [f.name for f in (tmp_path / "cache").rglob("[a-z]*") if f.is_file()]
    expected = ["dataset.json", "tokenizer.model", "train-00000.bin", "validation-00000.bin"]
    assert sorted(copies) == expected, "nothing is copied that is not read"
    assert tiny("data", "show", str(tmp_path / "there"), "--step", "2").code == 0
