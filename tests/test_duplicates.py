"""Duplicates: the first of all stays, whoever works and whatever interrupts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.cli import main
from bigtrain.data.corpus import Corpus
from bigtrain.data.duplicates import FOLDER, first_of_each, nearly
from bigtrain.data.minhash import bands_and_rows, signature
from bigtrain.data.prepare import PrepareOptions, prepare
from bigtrain.data.tokenizer import Tokenizer
from tests.data_parts import CHINESE, CODE, preparing, small_tokenizer
from tests.runs.worlds import ROOT
from tests.test_crew import content, mpirun
from tests.test_minhash import edited, jaccard
from tests.test_prepare import documents_of


class Signatures:
    """In memory, as `nearly` wants them."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def columns(self, columns: slice) -> np.ndarray:
        return self._rows[:, columns]

    def rows(self, documents: np.ndarray) -> np.ndarray:
        return self._rows[documents]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_the_first_of_equal_digests(pairs: list[tuple[int, int]]) -> None:
    stays, other = first_of_each(np.array(pairs, np.uint64).reshape(-1, 2))
    assert stays.tolist() == [pairs.index(pair) for pair in pairs]
    assert other.tolist() == [pairs.index(pair) != i for i, pair in enumerate(pairs)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_what_hangs_together_is_what_pairs_join(groups: list[int], seed: int) -> None:
    """Signatures of a group differ in few numbers, those of two groups in all: groups are what is found."""
    rng = np.random.default_rng(seed)
    b, r = bands_and_rows(0.8)
    base = rng.integers(0, 2**32, (6, b * r)).astype(np.uint32)
    rows = base[groups]
    for row in rows:
        row[rng.integers(0, b * r, 4)] += 1  # 96 % of the numbers stay, and most bands
    found = nearly(Signatures(rows), np.arange(len(groups)), 0.8)
    assert found.tolist() == [groups.index(group) for group in groups]


def variants(count: int, seed: int = 0) -> list[str]:
    """Prose, code and Chinese, with equal and nearly equal texts among them."""
    dice = random.Random(seed)
    words = ["".join(dice.choices("abcdefghijklmnop", k=dice.randint(2, 9))) for _ in range(500)]
    base = [" ".join(dice.choices(words, k=120)) for _ in range(count)]
    base += [CODE.replace("add", f"f{i}") + " ".join(dice.choices(words, k=60)) for i in range(count // 4)]
    base += [
        CHINESE[: 40 + i] + "".join(dice.choices("的一是在不了有和人这中大为上个国我以要他", k=200))
        for i in range(count // 4)
    ]
    found = list(base)
    found += [dice.choice(base) for _ in range(count // 3)]
    found += [edited(dice.choice(base), 0.003, i) for i in range(count // 2)]
    found += [edited(dice.choice(base), 0.2, i) for i in range(count // 4)]
    dice.shuffle(found)
    return found


def test_recall_and_precision_against_all_pairs() -> None:
    documents = variants(60)
    b, r = bands_and_rows(0.8)
    rows = np.stack([signature(text, b * r) for text in documents])
    stays = nearly(Signatures(rows), np.arange(len(documents)), 0.8)
    near = {
        (i, k)
        for i, k in combinations(range(len(documents)), 2)
        if jaccard(documents[i], documents[k]) >= 0.8
    }
    joined = {(i, k) for i, k in combinations(range(len(documents)), 2) if stays[i] == stays[k]}
    assert len(near) > 30
    assert len(near & joined) >= 0.95 * len(near)
    for i, k in joined - near:  # an estimate of 120 numbers: 0.1 below the threshold is four deviations
        assert jaccard(documents[i], documents[k]) > 0.68


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("duplicates")
    documents = variants(120, 1)
    half = len(documents) // 2
    for name, part in (("a.jsonl", documents[:half]), ("b.jsonl", documents[half:])):
        (folder / name).write_text("\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in part))
    return folder


def options(raw: Path, out: Path, **more: Any) -> PrepareOptions:
    base: dict[str, Any] = {
        "tokenizer": small_tokenizer().path,
        "unit_mb": 0.01,
        "dedup": "near",
        "workers": 1,
    }
    return PrepareOptions((str(raw),), out, **{**base, "validation_fraction": 0.1, **more})


def texts_of(out: Path) -> list[str]:
    return [
        text
        for split in ("train", "validation")
        for text in documents_of(Corpus.open(out, split), Tokenizer.load(out))  # type: ignore[arg-type]
    ]


@pytest.fixture(scope="module")
def alone(raw: Path) -> Path:
    out = raw.parent / f"{raw.name}-alone"
    summary = prepare(options(raw, out))
    assert summary.splits["train"]["shards"] > 5
    return out


def test_exactly_the_first_of_equal_texts_stay(raw: Path, tmp_path: Path) -> None:
    summary = prepare(options(raw, tmp_path / "out", dedup="exact"))
    documents = variants(120, 1)
    assert sorted(texts_of(tmp_path / "out")) == sorted(set(documents))
    assert summary.skipped == {"duplicates": len(documents) - len(set(documents))}
    a, b = summary.examples[0].split(": the same as ")
    lines = {str(f): f.read_text().split("\n") for f in raw.glob("*.jsonl")}
    for example in summary.examples:
        a, b = example.split(": the same as ")
        texts = []
        for place in (a, b):
            name, mark = (place.rsplit("@", 1)[0], "@") if "@" in place else (place.rsplit(":", 1)[0], ":")
            where = int(place.rsplit(mark, 1)[1])
            data = Path(name).read_bytes()
            texts.append(data[where:].split(b"\n")[0].decode() if mark == "@" else lines[name][where - 1])
        assert texts[0] == texts[1]
    assert not (tmp_path / "out" / FOLDER).exists()


def test_near_ones_go_too_and_are_counted(alone: Path, raw: Path) -> None:
    documents = variants(120, 1)
    kept = texts_of(alone)
    assert set(kept) <= set(documents)
    left = [(i, k) for i, k in combinations(kept, 2) if jaccard(i, k) > 0.93]
    assert left == []
    skipped = json.loads((alone / "dataset.json").read_text())["summary"]["skipped"]
    assert skipped["duplicates"] == len(documents) - len(set(documents))
    assert skipped["near_duplicates"] == len(set(documents)) - len(kept) > 30
    first = documents[0]
    assert first in kept, "the first of all stays"


@pytest.mark.parametrize("workers", [2, 3])
def test_any_workers_leave_out_the_same(workers: int, raw: Path, alone: Path, tmp_path: Path) -> None:
    prepare(options(raw, tmp_path / "out", workers=workers))
    assert content(tmp_path / "out") == content(alone)


def test_mpi_ranks_leave_out_the_same(raw: Path, alone: Path, tmp_path: Path) -> None:
    done = mpirun(4, raw, tmp_path / "out", "--dedup", "near", "--unit-mb", "0.01")
    assert done.returncode == 0, done.stderr
    mine, theirs = content(tmp_path / "out"), content(alone)
    del mine["dataset.json"], theirs["dataset.json"]
    assert mine == theirs


def test_killed_at_any_moment_and_started_again(raw: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = preparing(tmp_path / "script.py", options(raw, out, workers=2))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    for pattern, least in (("duplicates/*.json", 2), ("duplicates/*.left_out", 1), ("units/*.json", 1)):
        process = subprocess.Popen(command, env=env)
        ends = time.monotonic() + 60
        while len(list(out.glob(pattern))) < least and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it was through before it could be killed"
        assert not (out / "dataset.json").exists()
    prepare(options(raw, out))
    assert content(out) == content(alone)


def test_a_corpus_of_before_there_were_these_options_is_still_the_same(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(options(raw, out, dedup="none"))
    manifest = json.loads((out / "dataset.json").read_text())
    for key in (
        "dedup",
        "dedup_threshold",
        "filters",
        "chat_key",
        "prompt_key",
        "response_key",
        "chat_template",
    ):
        del manifest["request"][key]
    (out / "dataset.json").write_text(json.dumps(manifest))
    assert prepare(options(raw, out, dedup="none")).already_done
    command = ["prepare", str(raw), "--out", str(out), "--tokenizer", str(small_tokenizer().path)]
    command += ["--unit-mb", "0.01", "--validation-fraction", "0.1"]
    assert main([*command, "--dedup", "exact"]) == 2
    assert ", dedup" in capsys.readouterr().err
    assert main([*command, "--dedup", "near", "--dedup-threshold", "0.1"]) == 2
    assert "from 0.5 to 0.99" in capsys.readouterr().err
