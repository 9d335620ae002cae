"""Many workers, the same bytes: processes, MPI ranks, killed and started again; parts of large files."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.corpus import Corpus, verify
from bigtrain.data.documents import ReadOptions, Report, read_documents
from bigtrain.data.prepare import PrepareOptions, prepare
from bigtrain.data.sources import Source, find_sources
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.units import LARGEST, SMALLEST, spread, unit_bytes, units_of
from bigtrain.errors import UserError
from tests.data_parts import CHINESE, CODE, ENGLISH, preparing, small_tokenizer
from tests.runs.worlds import LAUNCHER_VARIABLES, with_mpirun
from tests.test_prepare import documents_of

ROOT = Path(__file__).parent.parent
UNIT = 0.02
SMALL = {"unit_mb": 0.001, "max_bad": 1.0}
"""Many units: a preparation that lasts while it is killed. A single line can be all of a part."""
"""1e6 bytes: the corpus below has about 12 units."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large file of JSON lines, one of parquet, a compressed one, many small ones; some lines are bad."""
    folder = tmp_path_factory.mktemp("crew") / "raw"
    folder.mkdir()
    dice = random.Random(3)
    texts = [f"{i} " + dice.choice((ENGLISH, CHINESE, CODE))[: dice.randrange(1, 900)] for i in range(400)]
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    lines[7], lines[300], lines[301] = "{", "", '{"text": ""}'
    (folder / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(
        pa.table({"text": [f"row {t}" for t in texts[:150]]}), folder / "b.parquet", row_group_size=20
    )
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[10:60]).encode()))
    for i in range(30):
        (folder / f"d{i:02d}.txt").write_text(f"file {i}\n" + ENGLISH)
    return folder


def options(raw: Path, out: Path, **changes: Any) -> PrepareOptions:
    start = PrepareOptions(
        (str(raw),), out, tokenizer=small_tokenizer().path, unit_mb=UNIT, validation_fraction=0.1
    )
    return replace(start, **changes)


def content(out: Path) -> dict[str, str]:
    """sha256 by name of everything in a corpus folder."""
    return {
        str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.rglob("*"))
    }


@pytest.fixture(scope="module")
def alone(raw: Path) -> Path:
    """The corpus as one process makes it."""
    made = options(raw, raw.parent / "alone", workers=1)
    summary = prepare(made)
    assert summary.splits["train"]["shards"] > 8
    assert summary.skipped == {"empty": 1, "bad_lines": 1}
    return made.out


def test_no_document_is_lost_and_the_order_of_units_is_that_of_the_inputs(raw: Path, alone: Path) -> None:
    stored = [
        text
        for split in ("train", "validation")
        for text in documents_of(Corpus.open(alone, split), Tokenizer.load(alone))
    ]
    read = read_documents(find_sources([str(raw)]).sources, ReadOptions(), Report())
    assert sorted(stored) == sorted(document.text for document in read)
    assert verify(alone) > 0
    assert not (alone / "units").exists()


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_write_the_same_bytes(workers: int, raw: Path, alone: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    made = options(raw, tmp_path / "out", workers=workers)
    summary = prepare(made, lambda p: seen.append((p.done_bytes, p.tokens)))
    assert content(made.out) == content(alone)
    assert summary.examples == prepare(replace(made, out=alone)).examples
    assert seen == sorted(seen), "progress never goes back"
    tokens = sum(split["tokens"] for split in summary.splits.values())
    assert seen[-1] == (sum(f.stat().st_size for f in raw.iterdir()), tokens)


def mpirun(ranks: int, raw: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env = with_mpirun({**outside, "OMP_NUM_THREADS": "1"})
    command = [
        "mpirun",
        "--oversubscribe",
        "-n",
        str(ranks),
        sys.executable,
        "-m",
        "bigtrain",
        "prepare",
        str(raw),
    ]
    command += ["--out", str(out), "--tokenizer", str(small_tokenizer().path), "--unit-mb", str(UNIT)]
    command += ["--validation-fraction", "0.1", *more]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("ranks", [4, 8])
def test_mpi_ranks_write_the_same_bytes(ranks: int, raw: Path, alone: Path, tmp_path: Path) -> None:
    done = mpirun(ranks, raw, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    mine, theirs = content(tmp_path / "out"), content(alone)
    del mine["dataset.json"], theirs["dataset.json"]  # its request names options that the command line sets
    assert mine == theirs
    assert done.stdout.count("dataset  ") == 1, "one rank speaks"


def test_an_error_on_one_mpi_rank_ends_all_with_one_message(raw: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(raw, bad)
    (bad / "c.jsonl.gz").write_bytes((bad / "c.jsonl.gz").read_bytes()[:-20])
    done = mpirun(3, bad, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("c.jsonl.gz: is damaged") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_killed_at_any_moment_and_started_again(raw: Path, tmp_path: Path) -> None:
    """All of it, or one worker; what is finished is kept, the result is the same."""
    out = tmp_path / "out"
    command = preparing(tmp_path / "script.py", options(raw, out, workers=2, **SMALL))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    dice, kept = random.Random(1), 0
    for attempt in range(4):
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        before = len(list(out.glob("units/*.json")))
        ends = time.monotonic() + 60
        while len(list(out.glob("units/*.json"))) <= before and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.002)
        time.sleep(dice.random() * 0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        assert workers, "it was through before it could be killed"
        victim = process.pid if attempt % 2 == 0 else workers[-1]
        os.kill(victim, signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
        if attempt % 2:
            assert "a worker was killed" in error, error
            assert "finished units are kept" in error
        ends = time.monotonic() + 20  # workers end with their parent
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < ends, "a worker outlived its parent"
            time.sleep(0.05)
        records = {f: f.stat().st_mtime_ns for f in out.glob("units/*.json")}
        kept = max(kept, len(records))
        assert not (out / "dataset.json").exists()
    assert kept > 1
    whole = tmp_path / "whole"
    assert prepare(options(raw, whole, workers=1, **SMALL)).splits["train"]["shards"] > 60
    prepare(options(raw, out, workers=2, **SMALL))
    assert content(out) == content(whole)


def test_finished_units_are_not_done_again(raw: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    late = raw / "d29.txt"  # read by the last unit alone
    text = late.read_bytes()
    try:
        stamp = late.stat().st_mtime_ns
        late.write_bytes(b"\xff" * len(text))
        os.utime(late, ns=(stamp, stamp))
        with pytest.raises(UserError, match=r"d29\.txt: invalid UTF-8"):
            prepare(options(raw, out, workers=1, bad_utf8="fail"))
        first = {f.name: f.stat().st_mtime_ns for f in out.glob("train-*.bin")}
        assert len(first) >= 8
        late.write_bytes(text)
        os.utime(late, ns=(stamp, stamp))
        prepare(options(raw, out, workers=1, bad_utf8="fail"))
    finally:
        late.write_bytes(text)
        os.utime(late, ns=(stamp, stamp))
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first
    mine, theirs = content(out), content(alone)
    mine.pop("dataset.json"), theirs.pop("dataset.json")
    assert mine == theirs


def test_an_unfinished_corpus_of_another_request_is_replaced(raw: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(options(raw, out, workers=1, seed=9))
    (out / "dataset.json").unlink()  # as if it had been killed at the very end, with its units
    (out / "units").mkdir()
    (out / "units" / "00000.json").write_text('{"request": "another"}')
    prepare(options(raw, out, workers=1))
    assert content(out) == content(alone)


def test_a_full_disk_in_a_worker_is_told(raw: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    out = tmp_path / "out"
    out.mkdir()
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"
    command = preparing(tmp_path / "script.py", options(raw, out, workers=2), limit)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "bigtrain.errors.RunError" in done.stderr
    assert "cannot write: no space left" in done.stderr
    assert not (out / "dataset.json").exists()


# ---- units


@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\r", b"x")), max_size=30), st.integers(1, 40)
)
@settings(max_examples=200, deadline=None)
def test_every_line_belongs_to_one_part(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    rows = [json.dumps({"text": line.hex() + "x"}).encode() for line in lines]
    path.write_bytes(b"\n".join(rows))
    source = Source(path, "jsonl", "", path.stat().st_size)
    units = units_of([source], size)
    assert sum(unit.size for unit in units) == source.size
    whole = [d.text for d in read_documents([source], ReadOptions(), Report())]
    parts = [d.text for unit in units for d in read_documents(unit.pieces, ReadOptions(), Report())]
    assert parts == whole == [line.hex() + "x" for line in lines]


def test_a_place_inside_a_part_can_be_found_again(raw: Path) -> None:
    source = find_sources([str(raw / "a.jsonl")]).sources[0]
    report = Report()
    found = [d for u in units_of([source], 5000) for d in read_documents(u.pieces, ReadOptions(), report)]
    data = source.path.read_bytes()
    for document in found[100:]:
        line = data[int(document.source.rpartition("@")[2]) :].partition(b"\n")[0]
        assert json.loads(line)["text"] == document.text
    rows = [d for u in units_of(find_sources([str(raw / "b.parquet")]).sources, 5000) for d in
            read_documents(u.pieces, ReadOptions(), Report())]  # fmt: skip
    assert [row.source.rpartition(":")[2] for row in rows] == [str(i) for i in range(1, 151)]


def test_units_suit_the_corpus() -> None:
    def sizes(*files: int) -> list[int]:
        sources = [Source(Path(str(i)), "jsonl", "", size) for i, size in enumerate(files)]
        return [unit.size for unit in units_of(sources, unit_bytes(sources))]

    assert sizes(10**6) == [10**6]
    assert sizes(*[10**6] * 100) == [*[16 * 10**6] * 6, 4 * 10**6]
    large = sizes(64 * 10**9)
    assert len(large) == 1024
    assert max(large) - min(large) <= 1
    assert max(sizes(10**13)) <= LARGEST + 1
    assert min(sizes(10**8)) >= SMALLEST
    units = units_of([Source(Path("x"), "jsonl", "", 10**9)], 10**7)
    few = spread(units, 10**8)
    assert len(few) == 10
    assert [unit.number for unit in few] == list(range(0, 100, 10))
    assert spread(units, 10**12) == units


def test_who_cannot_prepare(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun started 2 processes"):
        prepare(options(raw, tmp_path / "out"))
    with pytest.raises(UserError, match="must not be negative"):
        prepare(options(raw, tmp_path / "out", workers=-1))
