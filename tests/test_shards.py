"""Shards: Megatron's format byte for byte, read across borders, every kind of damage named."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from bigtrain.data import corpus as corpus_module
from bigtrain.data import shards as shards_module
from bigtrain.data.corpus import Corpus, verify
from bigtrain.data.manifest import write_manifest
from bigtrain.data.shards import ShardWriter, read_index, token_dtype
from bigtrain.errors import UserError
from tests.data_parts import random_documents, small_tokenizer, write_corpus


def parse_megatron(prefix: Path) -> tuple[list[np.ndarray], list[int]]:
    """A reader written from the format's description alone: sequences, and document borders."""
    raw = (prefix.parent / (prefix.name + ".idx")).read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    (version,) = struct.unpack_from("<Q", raw, 9)
    assert version == 1
    dtype = {8: np.uint16, 4: np.int32}[raw[17]]
    count, borders = struct.unpack_from("<QQ", raw, 18)
    at = 34
    lengths = struct.unpack_from(f"<{count}i", raw, at)
    pointers = struct.unpack_from(f"<{count}q", raw, at + 4 * count)
    documents = struct.unpack_from(f"<{borders}q", raw, at + 12 * count)
    assert len(raw) == at + 12 * count + 8 * borders
    data = (prefix.parent / (prefix.name + ".bin")).read_bytes()
    return [np.frombuffer(data, dtype, n, p) for n, p in zip(lengths, pointers, strict=True)], list(documents)


def test_the_format_is_megatrons(tmp_path: Path) -> None:
    documents = [*random_documents(20, 50), np.array([1, 2], np.int32), *random_documents(1, 90_000, seed=3)]
    write_corpus(tmp_path, documents)
    sequences, borders = parse_megatron(tmp_path / "train-00000")
    assert borders == list(range(len(documents) + 1))
    assert all(np.array_equal(a, b) for a, b in zip(sequences, documents, strict=True))


def test_a_document_beyond_the_length_limit_is_several_sequences_of_one_document(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x", small_tokenizer(), max_sequence=10)
    writer.add(np.arange(5, 30), text_bytes=1, source="a")
    writer.add(np.arange(5, 10), text_bytes=1, source="b")
    assert writer.close().documents == 2
    sequences, borders = parse_megatron(tmp_path / "x")
    assert [len(s) for s in sequences] == [10, 10, 5, 5]
    assert borders == [0, 3, 4]
    assert np.concatenate(sequences[:3]).tolist() == list(range(5, 30))


def test_dtype_holds_every_id() -> None:
    assert token_dtype(65499) == "uint16"
    assert token_dtype(65500) == "int32"


def test_sidecar_and_manifest_agree_with_the_files(tmp_path: Path) -> None:
    documents = random_documents(30, 50)
    write_corpus(tmp_path, documents, shards=2)
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    for shard in manifest["splits"]["train"]:
        sidecar = json.loads((tmp_path / f"{shard['name']}.json").read_text())
        data = (tmp_path / f"{shard['name']}.bin").read_bytes()
        assert {k: sidecar[k] for k in shard} == shard
        assert shard["crc32"] == [zlib.crc32(data)]
        assert shard["bin_bytes"] == len(data) == 2 * shard["tokens"]
        assert shard["max_id"] == np.frombuffer(data, np.uint16).max()
        assert sidecar["tokenizer"]["sha256"] == small_tokenizer().sha256
    assert manifest["totals"]["train"]["documents"] == 30
    assert manifest["totals"]["train"]["tokens"] == sum(map(len, documents))
    assert not list(tmp_path.glob("*.tmp"))


def test_reading_crosses_shard_borders(tmp_path: Path) -> None:
    documents = random_documents(40, 30)
    everything = np.concatenate(documents)
    corpus = Corpus.open(write_corpus(tmp_path, documents, shards=7))
    assert corpus.num_tokens == len(everything)
    assert (corpus.vocab_size, corpus.bos_id, corpus.eos_id) == (512, 1, 2)
    assert corpus.tokenizer_sha256 == small_tokenizer().sha256
    rng = np.random.default_rng(0)
    for _ in range(200):
        start, stop = sorted(rng.integers(0, len(everything) + 1, 2))
        assert np.array_equal(corpus.read(int(start), int(stop - start)), everything[start:stop])


def test_more_shards_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_OPEN", 3)
    documents = random_documents(40, 30)
    corpus = Corpus.open(write_corpus(tmp_path, documents, shards=20))
    assert np.array_equal(corpus.read(0, corpus.num_tokens), np.concatenate(documents))
    assert corpus._map.cache_info().currsize == 3


def test_the_hash_depends_on_the_tokens_alone(tmp_path: Path) -> None:
    documents = random_documents(20, 30)
    a = Corpus.open(write_corpus(tmp_path / "a", documents))
    b = Corpus.open(write_corpus(tmp_path / "elsewhere", documents))
    documents[7] = documents[7].copy()
    documents[7][0] = 9
    c = Corpus.open(write_corpus(tmp_path / "c", documents))
    assert a.manifest_hash == b.manifest_hash != c.manifest_hash


@pytest.mark.parametrize("change", [-1, +1])
def test_a_shard_of_another_size_is_named_at_open(tmp_path: Path, change: int) -> None:
    write_corpus(tmp_path, random_documents(30, 30), shards=3)
    shard = tmp_path / "train-00001.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] if change < 0 else data + b"\0")
    state = "truncated" if change < 0 else "longer"
    with pytest.raises(UserError, match=rf"train-00001\.bin: has {len(data) + change} bytes.*: {state}"):
        Corpus.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, random_documents(30, 30), shards=3)
    (tmp_path / "train-00002.bin").unlink()
    with pytest.raises(UserError, match=r"train-00002\.bin: the shard is missing"):
        Corpus.open(tmp_path)


def test_verify_finds_one_flipped_bit_and_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "BLOCK", 1024)
    write_corpus(tmp_path, random_documents(200, 60), shards=2)
    size = sum(f.stat().st_size for f in tmp_path.iterdir() if f.suffix in (".bin", ".idx"))
    assert verify(tmp_path) == size
    shard = tmp_path / "train-00001.bin"
    data = bytearray(shard.read_bytes())
    data[3500] ^= 1
    shard.write_bytes(data)
    Corpus.open(tmp_path)  # sizes are right, so opening cannot see it
    with pytest.raises(UserError, match=r"train-00001\.bin: block 3 \(bytes 3072 to 4095\) was altered"):
        verify(tmp_path)
    data[3500] ^= 1
    shard.write_bytes(data)
    index = tmp_path / "train-00000.idx"
    altered = bytearray(index.read_bytes())
    altered[-1] ^= 1
    index.write_bytes(altered)
    with pytest.raises(UserError, match=r"train-00000\.idx: was altered"):
        verify(tmp_path)


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, random_documents(10, 30))
    other = small_tokenizer("unigram")
    (tmp_path / "tokenizer.model").write_bytes(other.model)
    with pytest.raises(UserError, match=r"tokenizer\.model: is not the tokenizer .*dataset\.json") as caught:
        Corpus.open(tmp_path)
    assert other.sha256[:12] in str(caught.value)
    assert small_tokenizer().sha256[:12] in str(caught.value)


def test_ids_outside_the_vocabulary_are_refused_at_open_and_on_reading(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    writer = ShardWriter(tmp_path / "train-00000", tokenizer)
    writer.add(np.array([1, 600, 2]), text_bytes=1, source="")
    write_manifest(tmp_path, tokenizer, {"train": [writer.close()]}, request={}, summary={})
    with pytest.raises(UserError, match=r"train-00000\.bin: holds ids up to 600"):
        Corpus.open(tmp_path)
    plain = Corpus.open(tmp_path / "train-00000", tokenizer=tokenizer.path)
    with pytest.raises(UserError, match=r"train-00000\.bin: token id 600"):
        plain.read(0, 3)


@pytest.mark.parametrize("name", ["train-00000", "train-00000.bin", "train-00000.idx"])
def test_a_plain_megatron_corpus_opens_by_its_prefix(tmp_path: Path, name: str) -> None:
    documents = random_documents(10, 30)
    write_corpus(tmp_path, documents)
    (tmp_path / "dataset.json").unlink()
    corpus = Corpus.open(tmp_path / name, tokenizer=tmp_path)
    assert np.array_equal(corpus.read(0, corpus.num_tokens), np.concatenate(documents))
    with pytest.raises(UserError, match="does not say which tokenizer"):
        Corpus.open(tmp_path / name)
    with pytest.raises(UserError, match="no validation split"):
        Corpus.open(tmp_path / name, "validation", tokenizer=tmp_path)
    data = tmp_path / "train-00000.bin"
    data.write_bytes(data.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00000\.bin: .*truncated"):
        Corpus.open(tmp_path / name, tokenizer=tmp_path)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path, random_documents(10, 30))
    index = tmp_path / "train-00000.idx"
    good = index.read_bytes()
    for bad, why in [
        (good[:-4], "truncated"),
        (b"GGUF" + good[4:], "must start with MMIDIDX"),
        (good[:17] + b"\x63" + good[18:], "dtype code 99"),
        (good[:34] + b"\x07\x07" + good[36:], "one after another"),
        (b"", "must start with"),
    ]:
        index.write_bytes(bad)
        with pytest.raises(UserError, match=why):
            read_index(index)


def test_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a prepared corpus: the folder does not exist"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no dataset\.json in it") as caught:
        Corpus.open(tmp_path)
    assert "bigtrain prepare" in caught.value.do
    write_corpus(tmp_path, random_documents(10, 30))
    manifest = tmp_path / "dataset.json"
    good = manifest.read_text()
    for bad, why in [
        (good[:100], "cannot be read as a corpus manifest"),
        ("[]", "cannot be read"),
        (good.replace("dataset 1", "dataset 9"), "has format 'bigtrain dataset 9'"),
        (good.replace('"tokens": ', '"tokens": 1', 2), "changed by hand"),
    ]:
        manifest.write_text(bad)
        with pytest.raises(UserError, match=why):
            Corpus.open(tmp_path)
    manifest.write_text(good)
    assert Corpus.open(tmp_path, "validation").num_tokens == 0


def test_an_empty_shard_is_passed_over(tmp_path: Path) -> None:
    first, last = random_documents(2, 9, seed=3)
    documents = [first, np.empty(0, np.int32), last]
    corpus = Corpus.open(write_corpus(tmp_path, documents, shards=3))
    expected = np.concatenate(documents).tolist()
    assert corpus.read(0, corpus.num_tokens).tolist() == expected
    assert corpus.read_mask(0, corpus.num_tokens).all()
