"""Documents at a place of a corpus, against the plain way of counting through all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bigtrain.data.corpus import Corpus
from bigtrain.data.find import Found, documents_at
from bigtrain.errors import UserError
from tests.data_parts import random_documents, write_corpus


def counted(corpus: Corpus, documents: list[np.ndarray], shards: int) -> list[tuple[str, int, int]]:
    """(shard, document, token of the document) of every token, in order."""
    cuts = [len(part) for part in np.array_split(np.arange(len(documents)), shards)]
    found, rest = [], list(documents)
    for shard, count in enumerate(cuts):
        for number in range(count):
            found += [(f"train-{shard:05d}.bin", number, i) for i in range(len(rest[number]))]
        rest = rest[count:]
    assert len(found) == corpus.num_tokens
    return found


@pytest.mark.parametrize("shards", [1, 3])
def test_every_stretch(tmp_path: Path, shards: int) -> None:
    documents = random_documents(30, 12)
    corpus = Corpus.open(write_corpus(tmp_path, documents, shards=shards))
    expected = counted(corpus, documents, shards)
    lengths = {}
    for shard, number, i in expected:
        lengths[shard, number] = i + 1
    for start in range(0, corpus.num_tokens - 20, 3):
        found = list(documents_at(corpus, start, 20))
        tokens = [(f.shard.name, f.document, f.begins + i) for f in found for i in range(f.size)]
        assert tokens == expected[start : start + 20]
        assert [f.start for f in found] == [start + sum(e.size for e in found[:n]) for n in range(len(found))]
        assert all(f.tokens == lengths[f.shard.name, f.document] for f in found)


def test_a_document_of_several_sequences_and_an_index_that_is_damaged(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, random_documents(5, 50), max_sequence=7)
    corpus = Corpus.open(folder)
    assert {f.document for f in documents_at(corpus, 0, corpus.num_tokens)} == set(range(5))
    assert isinstance(next(documents_at(corpus, 3, 4)), Found)
    (folder / "train-00000.idx").write_bytes(b"MMIDIDX")
    with pytest.raises(UserError, match=r"train-00000\.idx"):
        list(documents_at(corpus, 0, 5))
