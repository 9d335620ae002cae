"""Preparing a corpus: the tokens are the text, splits are fair, faults leave nothing half-done."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.corpus import Corpus, verify
from bigtrain.data.documents import Document
from bigtrain.data.prepare import PrepareOptions, Progress, prepare
from bigtrain.data.sampling import sample_texts
from bigtrain.data.splitting import shuffled, split_documents
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import RunError, UserError
from tests.data_parts import CHINESE, CODE, ENGLISH, HOSTILE, small_tokenizer, texts


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of raw text in every format."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "english.txt").write_text(ENGLISH)
    (folder / "chinese.md").write_text(CHINESE)
    (folder / "code.py").write_text(CODE)
    lines = [json.dumps({"text": text}) for text in [*texts(), *(f"document {i}" for i in range(200))]]
    (folder / "many.jsonl").write_text("\n".join(lines))
    return folder


def options(raw: Path, **changes: Any) -> PrepareOptions:
    start = PrepareOptions((str(raw),), raw.parent / "corpus", tokenizer=small_tokenizer().path)
    return replace(start, **changes)


def documents_of(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    ids = corpus.read(0, corpus.num_tokens)
    ends = np.flatnonzero(ids == corpus.eos_id) + 1
    parts = np.split(ids, ends)
    assert len(parts.pop()) == 0
    assert all(part[0] == corpus.bos_id for part in parts)
    return [tokenizer.decode(part[1:-1]) for part in parts]


def expected_texts(raw: Path) -> list[str]:
    return [ENGLISH, CHINESE, CODE, *(t for t in texts() if t), *(f"document {i}" for i in range(200))]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_text_comes_back_out_of_the_shards(raw: Path, kind: str) -> None:
    wanted = options(raw, tokenizer=None, tokenizer_kind=kind, vocab_size=500, shard_tokens=5000)
    progress: list[Progress] = []
    summary = prepare(wanted, progress.append)
    train, held_out = Corpus.open(wanted.out), Corpus.open(wanted.out, "validation")
    tokenizer = Tokenizer.load(wanted.out)
    stored = documents_of(train, tokenizer) + documents_of(held_out, tokenizer)
    assert Counter(stored) == Counter(expected_texts(raw))
    assert summary.vocab_size == tokenizer.vocab_size == 500
    assert summary.splits["train"]["shards"] > 2
    assert summary.splits["train"]["tokens"] == train.num_tokens
    assert train.text_bytes + held_out.text_bytes == sum(len(t.encode()) for t in stored)
    sizes = tokenizer.token_bytes()
    assert sizes[train.read(0, train.num_tokens)].sum() == train.text_bytes
    assert summary.skipped == {"empty": 1}
    assert verify(wanted.out) > 0
    assert progress[0].stage == "tokenizer"
    assert {p.stage for p in progress} == {"tokenizer", "training", "encode"}
    last = progress[-1]
    assert last.done_bytes == last.total_bytes == sum(f.stat().st_size for f in raw.iterdir())
    assert last.tokens == train.num_tokens + held_out.num_tokens


def test_the_same_request_makes_the_same_bytes_and_another_seed_another_order(raw: Path) -> None:
    def content(out: Path) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in out.iterdir()}

    made = options(raw, tokenizer=None, vocab_size=500)
    prepare(made)
    first = content(made.out)
    prepare(replace(made, out=raw.parent / "again"))
    assert content(raw.parent / "again") == first
    prepare(replace(made, out=raw.parent / "other", seed=2))
    other = content(raw.parent / "other")
    assert len(other["train-00000.bin"]) > 0
    assert other["train-00000.bin"] != first["train-00000.bin"]
    tokenizer = Tokenizer.load(raw.parent / "other")
    a = documents_of(Corpus.open(made.out, "validation"), Tokenizer.load(made.out))
    b = documents_of(Corpus.open(raw.parent / "other", "validation"), tokenizer)
    assert sorted(a) == sorted(b)


def test_without_shuffling_documents_stay_in_order(raw: Path) -> None:
    made = options(raw, shuffle_mb=0, validation_fraction=0)
    summary = prepare(made)
    assert summary.splits["validation"]["documents"] == 0
    stored = documents_of(Corpus.open(made.out), small_tokenizer())
    assert stored[:3] == [CHINESE, CODE, ENGLISH]
    assert stored[-200:] == [f"document {i}" for i in range(200)]


def test_a_finished_corpus_is_kept_unless_told_otherwise(raw: Path) -> None:
    made = options(raw)
    first = prepare(made)
    before = {f: f.stat().st_mtime_ns for f in made.out.iterdir()}
    again = prepare(made)
    assert again.already_done
    assert replace(again, seconds=first.seconds, already_done=False) == first
    with pytest.raises(
        UserError, match="already holds a corpus, prepared with another validation_fraction, seed"
    ) as e:
        prepare(replace(made, seed=9, validation_fraction=0.5))
    assert "--overwrite" in e.value.do
    (raw / "new.txt").write_text("a new file")
    with pytest.raises(UserError, match="prepared with another inputs, input_files"):
        prepare(made)
    assert {f: f.stat().st_mtime_ns for f in made.out.iterdir()} == before
    replaced = prepare(replace(made, overwrite=True, shard_tokens=10**9))
    assert (
        sum(s["documents"] for s in replaced.splits.values())
        == sum(s["documents"] for s in first.splits.values()) + 1
    )


def test_a_finished_but_damaged_corpus_is_not_called_done(raw: Path) -> None:
    made = options(raw)
    prepare(made)
    shard = made.out / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"train-00000\.bin: .*truncated"):
        prepare(made)
    assert not prepare(replace(made, overwrite=True)).already_done


def test_killed_in_the_middle_it_starts_over_and_leaves_no_stale_shard(raw: Path) -> None:
    made = options(raw, shard_tokens=2000)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from bigtrain.data import encode\n"
        "from bigtrain.data.prepare import PrepareOptions, prepare\n"
        "class Dying(encode.ShardSet):\n"
        "    def add(self, *a, **k):\n"
        "        super().add(*a, **k)\n"
        "        if self.tokens > 9000 and self._writer: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import bigtrain.data.unit_work as module\n"
        "module.ShardSet = Dying\n"
        "raw, out, tokenizer = sys.argv[1:]\n"
        "prepare(PrepareOptions((raw,), Path(out), tokenizer=Path(tokenizer), shard_tokens=2000))\n"
    )
    command = [sys.executable, "-c", script, str(raw), str(made.out), str(small_tokenizer().path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {f.name for f in made.out.iterdir()}
    assert "dataset.json" not in left
    assert "train-00000.bin" in left
    assert any(name.endswith(".tmp") for name in left)
    with pytest.raises(UserError, match="not a prepared corpus"):
        Corpus.open(made.out)
    prepare(replace(made, shard_tokens=10**9))
    assert {f.name for f in made.out.iterdir() if f.name.startswith("train")} == {
        "train-00000.bin",
        "train-00000.idx",
        "train-00000.json",
    }
    assert verify(made.out) > 0


def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_looks_whole(raw: Path) -> None:
    """On a real tmpfs of 64 kB where that can be mounted, else with a limit on the file size."""
    made = options(raw, out=raw.parent / "small", shuffle_mb=0)
    (raw / "big.txt").write_text("".join(f"{i} {ENGLISH}" for i in range(3000)))
    made.out.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(made.out)], capture_output=True
        ).returncode
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
        with pytest.raises(RunError, match=r"small/train-00000\.bin: cannot write: no space left") as caught:
            prepare(made)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno in (errno.ENOSPC, errno.EFBIG)
        assert "free space" in caught.value.do
        assert {f.name for f in made.out.iterdir()} <= {"tokenizer.model"}
        with pytest.raises(UserError, match="not a prepared corpus"):
            Corpus.open(made.out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(made.out)], check=True)
    assert prepare(made).splits["train"]["tokens"] > 32 * 1024


def test_inputs_without_text_say_what_was_found(raw: Path) -> None:
    nothing = raw.parent / "nothing"
    nothing.mkdir()
    (nothing / "a.txt").write_text("")
    (nothing / "b.txt").write_bytes(b"\0\1")
    for tokenizer in (None, small_tokenizer().path):
        with pytest.raises(UserError, match=r"no text in the inputs \(1 empty, 1 binary\); looked for \.txt"):
            prepare(options(raw, inputs=(str(nothing),), tokenizer=tokenizer))
    with pytest.raises(UserError, match="no such file"):
        prepare(options(raw, inputs=(str(raw), str(raw / "missing.txt"))))


def test_impossible_options_are_refused_before_anything_is_written(raw: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"validation_fraction": 1.0}, "validation_fraction 1.0 must be at least 0 and below 1"),
        ({"shard_tokens": 0}, "must be positive"),
        ({"out": raw / "english.txt"}, "the output is a file"),
        ({"tokenizer": raw / "english.txt"}, "not a SentencePiece model"),
    ]
    for changes, why in refused:
        with pytest.raises(UserError, match=why):
            prepare(options(raw, **changes))
    with pytest.raises(UserError, match="larger than the text supports"):
        prepare(options(raw, tokenizer=None, vocab_size=60_000))
    assert not (raw.parent / "corpus" / "dataset.json").exists()


words = st.lists(st.text(st.sampled_from("abcdefgh"), min_size=1), max_size=60)


@given(words, st.sampled_from([0.01, 0.3, 0.99]), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_splits_do_not_depend_on_the_order_and_are_never_empty(
    found: list[str], fraction: float, choose: Any
) -> None:
    def split(given: list[str]) -> dict[str, list[str]]:
        sides: dict[str, list[str]] = {"train": [], "validation": []}
        for side, document in split_documents([Document(t, "") for t in given], fraction):
            sides[side].append(document.text)
        return {side: sorted(members) for side, members in sides.items()}

    first = split(found)
    assert sorted(first["train"] + first["validation"]) == sorted(found)
    assert bool(first["train"]) == (len(found) > 0)
    assert bool(first["validation"]) == (len(found) > 1)
    again = found.copy()
    choose.shuffle(again)
    assert split(again) == first


def test_the_validation_share_is_as_asked() -> None:
    many = [Document(f"text {i}", "") for i in range(20_000)]
    share = sum(side == "validation" for side, _ in split_documents(many, 0.05)) / len(many)
    assert abs(share - 0.05) < 0.006  # standard error 0.0015


def test_shuffling_keeps_every_document_and_mixes_far() -> None:
    many = [Document(f"{i:05d}", "") for i in range(3000)]
    mixed = list(shuffled(many, 5 * 500, seed=3))
    assert sorted(d.text for d in mixed) == [d.text for d in many]
    assert mixed == list(shuffled(many, 5 * 500, seed=3))
    assert mixed != list(shuffled(many, 5 * 500, seed=4))
    moved = [abs(int(d.text) - place) for place, d in enumerate(mixed)]
    assert np.mean(moved) > 200


def test_the_tokenizer_sample_is_fair_and_does_not_depend_on_the_order() -> None:
    many = [f"document {i}\n" * 20 for i in range(2000)]
    sample = sample_texts(many, 100_000, seed=1)
    assert abs(sum(len(t) for t in sample) - 100_000) < 1000
    assert sample == sample_texts(reversed(many), 100_000, seed=1)
    assert sample != sample_texts(many, 100_000, seed=2)
    places = [int(t.split()[1]) for t in sample]
    assert abs(np.mean(places) - 1000) < 120  # standard error 30
    everything = sample_texts([*many, *HOSTILE], 10**9, seed=1)
    assert Counter(everything) == Counter([*many, *(t for t in HOSTILE if t)])
    long = "x" * 500_000 + "\n" + "line\n" * 100_000
    cut = sample_texts([long], 10**9, seed=1)
    assert max(map(len, cut)) <= 2 * 2**16
    assert sum(map(len, cut)) == len(long)
