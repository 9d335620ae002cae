"""Best-fit packing: equal to the slow rule, nothing lost, files that are checked, training on whole documents."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.cli import main
from bigtrain.data.corpus import Corpus
from bigtrain.data.loader import Loader
from bigtrain.data.packing import Packed, Packs, pack, pack_corpus
from bigtrain.data.samples import BestFit, Samples
from bigtrain.errors import UserError
from bigtrain.model.batch import IGNORE
from tests.data_parts import random_documents, write_corpus


def slow_pack(lengths: list[int], size: int) -> list[list[tuple[int, int]]]:
    """The rule as it is written, in quadratic time."""
    found: list[list[tuple[int, int]]] = []
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for start, length in zip(starts, lengths, strict=True):
        if length > size:
            for first in range(0, length, size):
                found.append([(start + first, min(size, length - first))])
    order = [i for i in range(len(lengths)) if 0 < lengths[i] <= size]
    for i in sorted(order, key=lambda i: -lengths[i]):
        rooms = [(size - sum(n for _, n in sequence), number) for number, sequence in enumerate(found)]
        best = min((r for r in rooms if r[0] >= lengths[i]), default=None)
        if best is None:
            found.append([])
        found[len(found) - 1 if best is None else best[1]].append((starts[i], lengths[i]))
    return found


def listed(packed: Packed) -> list[list[tuple[int, int]]]:
    parts = list(zip(packed.starts.tolist(), packed.sizes.tolist(), strict=True))
    return [parts[a:b] for a, b in pairwise(packed.borders.tolist())]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(2, 17))
@settings(max_examples=200, deadline=None)
def test_equal_to_the_slow_rule_and_nothing_is_lost(lengths: list[int], size: int) -> None:
    found = listed(pack(np.array(lengths, np.int64), size))
    assert found == slow_pack(lengths, size)
    covered = sorted(t for sequence in found for start, n in sequence for t in range(start, start + n))
    assert covered == list(range(sum(lengths)))
    assert all(0 < sum(n for _, n in sequence) <= size for sequence in found)


def test_the_packing_never_changes_between_versions() -> None:
    """A resumed run must read the sequences it began with."""
    lengths = np.random.default_rng(1).integers(1, 30, 12)
    expected = [[(45, 6), (146, 10)], [(51, 16)], [(67, 12)], [(86, 16)], [(102, 8), (138, 8)]]
    assert listed(pack(lengths, 16))[1:6] == expected


def test_few_documents_are_cut_and_little_is_padded() -> None:
    lengths = np.random.default_rng(0).lognormal(6.5, 1.3, 20_000).astype(np.int64) + 2
    packed = pack(lengths, 4096)
    assert 1 - lengths.sum() / (4096 * (len(packed.borders) - 1)) < 0.002
    assert len(packed.starts) - len(lengths) == (-(-lengths[lengths > 4096] // 4096) - 1).sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("packed"), random_documents(200, 70), shards=4)


def test_any_workers_write_the_same_and_what_is_done_is_kept(folder: Path, tmp_path: Path) -> None:
    written = []
    for workers in (1, 2):
        pack_corpus(folder, 32, workers=workers)
        files = [*sorted(folder.glob("*.pack32")), folder / "pack32.json"]
        assert len(files) == 5
        written.append([f.read_bytes() for f in files])
        files[2].unlink()
        files[1].write_bytes(files[1].read_bytes()[:-3])
        times = files[0].stat().st_mtime_ns
        pack_corpus(folder, 32)
        assert [f.read_bytes() for f in files] == written[-1]
        assert files[0].stat().st_mtime_ns == times
        for file in files:
            file.unlink()
    assert written[0] == written[1]


def test_sequences_hold_whole_documents_and_their_targets(folder: Path) -> None:
    pack_corpus(folder, 32)
    corpus = Corpus.open(folder)
    samples = Samples({"a": corpus}, Samples.single(corpus, 32, 3).blend.stages, [32], 3, cut=BestFit)
    loader = Loader(samples, seed=3)
    seen: list[int] = []
    targets = 0
    for sample in range(samples.epoch(0, 0)):
        batch = loader.batch([sample])
        (row,) = samples.rows([sample])
        at = 0
        assert batch.cu_seqlens is not None
        borders = batch.cu_seqlens.tolist()
        for piece in row:
            seen += range(piece.start, piece.start + piece.size)
            read = corpus.read(piece.start, min(piece.size + 1, corpus.num_tokens - piece.start)).tolist()
            assert batch.tokens[0, at : at + piece.size].tolist() == read[: piece.size]
            expected = [
                IGNORE if a == corpus.eos_id else b for a, b in zip(read, [*read[1:], 0], strict=True)
            ]
            assert batch.targets[0, at : at + piece.size].tolist() == expected[: piece.size]
            at += piece.size
            assert at in borders
        assert (batch.targets[0, at:] == IGNORE).all()
        targets += batch.counted()
    assert sorted(seen) == list(range(corpus.num_tokens)), "every token once an epoch"
    assert targets == corpus.num_tokens - 200, "and each is a target but the first of a document"
    assert Packs.open(folder, "train", 32).padding < 0.08


def test_what_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"not packed into sequences of 48 tokens[\s\S]*bigtrain pack"):
        Packs.open(folder, "train", 48)
    other = write_corpus(tmp_path, random_documents(30, 70, 9))
    assert main(["pack", str(other), "--sequence-length", "32"]) == 0
    assert "documents are longer and cut" in capsys.readouterr().out
    write_corpus(tmp_path, random_documents(30, 60, 8))
    with pytest.raises(UserError, match="packed from another corpus"):
        Packs.open(other, "train", 32)
    pack_corpus(folder, 32)
    packs = Packs.open(folder, "train", 32)
    file = folder / "train-00000.pack32"
    file.write_bytes(b"x" * file.stat().st_size)
    with pytest.raises(UserError, match=r"train-00000.pack32: is damaged"):
        packs.parts(0)
    (folder / "pack32.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a packing"):
        Packs.open(folder, "train", 32)
    assert main(["pack", str(folder), "--sequence-length", "1"]) == 2
    assert main(["pack", str(tmp_path / "no"), "--sequence-length", "8"]) == 2
    plain = Corpus.open(folder / "train-00001", tokenizer=folder)
    with pytest.raises(UserError, match="Megatron"):
        BestFit(plain, 32, 1)
