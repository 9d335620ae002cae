"""megatron-core reads our shards and we read its, document by document."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.data.corpus import Corpus
from bigtrain.data.shards import ShardWriter, read_index
from tests.data_parts import random_documents, small_tokenizer, write_corpus


@pytest.fixture(scope="module")
def megatron() -> Any:
    """megatron-core's module on indexed datasets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset",
            reason="megatron-core is not installed",
            exc_type=ImportError,
        )


def test_it_reads_our_shards(megatron: Any, tmp_path: Path) -> None:
    documents = [*random_documents(51, 80), random_documents(1, 70_000, 3)[0]]
    write_corpus(tmp_path, documents, shards=2)
    read = 0
    for shard in ("train-00000", "train-00001"):
        theirs = megatron.IndexedDataset(str(tmp_path / shard))
        assert len(theirs) == 26
        assert theirs.document_indices.tolist() == list(range(27))
        for i in range(len(theirs)):
            assert theirs[i].tolist() == documents[read].tolist()
            read += 1
    assert read == len(documents)


def test_it_reads_our_shards_of_a_large_vocabulary(megatron: Any, tmp_path: Path) -> None:
    """Also documents without tokens, which are borders without a sequence; prepare writes none."""
    tokenizer = copy.copy(small_tokenizer())
    tokenizer.vocab_size = 70_000
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 70_000, n).astype(np.int32) for n in (40, 0, 3, 70_000, 0)]
    writer = ShardWriter(tmp_path / "wide", tokenizer)
    for document in documents:
        writer.add(document, text_bytes=1, source="")
    writer.close()
    theirs = megatron.IndexedDataset(str(tmp_path / "wide"))
    assert theirs.index.dtype == np.int32
    borders = theirs.document_indices.tolist()
    found = [[id_ for i in range(a, b) for id_ in theirs[i].tolist()] for a, b in pairwise(borders)]
    assert found == [document.tolist() for document in documents]


def test_it_reads_documents_of_several_sequences(megatron: Any, tmp_path: Path) -> None:
    documents = random_documents(20, 60)
    writer = ShardWriter(tmp_path / "long", small_tokenizer(), max_sequence=7)
    for document in documents:
        writer.add(document, text_bytes=1, source="")
    writer.close()
    theirs = megatron.IndexedDataset(str(tmp_path / "long"))
    borders = theirs.document_indices.tolist()
    assert len(borders) == 21
    for document, first, last in zip(documents, borders, borders[1:], strict=False):
        assert np.concatenate([theirs[i] for i in range(first, last)]).tolist() == document.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_its_shards(megatron: Any, tmp_path: Path, dtype: type) -> None:
    documents = [*random_documents(40, 90), np.empty(0, np.int32), random_documents(1, 70_000, 3)[0]]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    import torch

    for document in documents:
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    corpus = Corpus.open(tmp_path / "theirs", tokenizer=small_tokenizer().path)
    assert corpus.read(0, corpus.num_tokens).tolist() == np.concatenate(documents).tolist()
    assert read_index(tmp_path / "theirs.idx").dtype == np.dtype(dtype).name
    assert corpus.longest == max(map(len, documents))
