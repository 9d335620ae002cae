"""Every kind of bad input that was seen in the field has an outcome that is counted and reported."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from bigtrain.data.corpus import Corpus, verify
from bigtrain.data.encoders import FASTEST
from bigtrain.data.prepare import PrepareOptions, PrepareSummary, prepare
from bigtrain.data.shards import ShardWriter, read_index
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError
from tests.data_parts import random_documents, small_tokenizer, texts, write_corpus
from tests.test_prepare import documents_of

GOOD = [f"a good document, number {i}" for i in range(20)]


def prepared(folder: Path, lines: list[bytes], **options: Any) -> tuple[PrepareSummary, list[str]]:
    """Good lines around the given ones; the summary and what is stored."""
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    (folder / "raw.jsonl").write_bytes(b"\n".join([*good[:10], *lines, *good[10:]]))
    base: dict[str, Any] = {"tokenizer": small_tokenizer().path, "validation_fraction": 0, "shuffle_mb": 0}
    made = PrepareOptions((str(folder / "raw.jsonl"),), folder / "out", **{**base, **options})
    summary = prepare(made)
    stored = documents_of(Corpus.open(made.out), Tokenizer.load(made.out))
    assert [text for text in stored if text in GOOD] == GOOD
    return summary, stored[10:-10]


def as_json(text: str, *, ascii_only: bool = False) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=ascii_only).encode()


@pytest.mark.parametrize(
    ("line", "counted", "stored"),
    [
        (b'{"text": "caf\xe9 and \xff"}', {"bad_utf8": 1}, ["caf\ufffd and \ufffd"]),
        (b'{"text": "half \\ud800 of a pair"}', {"surrogates": 1}, ["half \ufffd of a pair"]),
        (as_json(""), {"empty": 1}, []),
        (b'{"text": NaN}', {"bad_lines": 1}, []),
        (b'{"text": null}', {"bad_lines": 1}, []),
        (b'{"txt": "missing key"}', {"bad_lines": 1}, []),
        (b'{"text": "torn', {"bad_lines": 1}, []),
        (b"[1, 2]", {"bad_lines": 1}, []),
        (b"[" * 100_000, {"bad_lines": 1}, []),
        (as_json("</s> <s> <mask> <unk> <pad> <0x0A>"), {}, ["</s> <s> <mask> <unk> <pad> <0x0A>"]),
        (as_json("\u2581 and \u2581\u2581x"), {}, ["\u2581 and \u2581\u2581x"]),
        (as_json("nul \0, CRLF\r\n, tab\t,  two  spaces "), {}, ["nul \0, CRLF\r\n, tab\t,  two  spaces "]),
        (
            as_json("e\u0301 \ufb01 \u2460 \uff46 \U0001f469\u200d\U0001f467"),
            {},
            ["e\u0301 \ufb01 \u2460 \uff46 \U0001f469\u200d\U0001f467"],
        ),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_line(line: bytes, counted: dict[str, int], stored: list[str], tmp_path: Path) -> None:
    summary, found = prepared(tmp_path, [line])
    assert summary.skipped == counted
    assert found == stored
    if counted:
        assert summary.examples[0].startswith(f"{tmp_path / 'raw.jsonl'}:11: "), "the place is named"


def test_invalid_bytes_by_policy(tmp_path: Path) -> None:
    (tmp_path / "skip").mkdir()
    summary, found = prepared(tmp_path / "skip", [b'{"text": "caf\xe9"}'], bad_utf8="skip")
    assert (summary.skipped, found) == ({"bad_utf8": 1}, [])
    with pytest.raises(UserError, match="invalid UTF-8 at byte"):
        prepared(tmp_path, [b'{"text": "caf\xe9"}'], bad_utf8="fail")


def test_too_many_bad_lines_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 of 24 lines are unusable, more than the 10% allowed"):
        prepared(tmp_path, [b'{"text": NaN}'] * 4)


@pytest.mark.parametrize("encoder", ["sentencepiece", *FASTEST])
def test_names_of_control_pieces_end_nothing_whoever_encodes(encoder: Any, tmp_path: Path) -> None:
    if encoder != "sentencepiece" and importlib.util.find_spec(encoder) is None:
        pytest.skip(f"no {encoder} here")
    summary, found = prepared(tmp_path, [as_json("ends </s> not <mask> here")], encoder=encoder)
    assert summary.encoder == encoder
    assert found == ["ends </s> not <mask> here"]
    corpus = Corpus.open(tmp_path / "out")
    assert (corpus.read(0, corpus.num_tokens) == corpus.eos_id).sum() == len(GOOD) + 1


def test_a_space_symbol_that_a_tokenizer_loses_is_counted(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts()[:20], *GOOD]), model_writer=model, vocab_size=300, model_type="bpe",
        character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "theirs.model").write_bytes(model.getvalue())
    (tmp_path / "raw.txt").write_text("one \u2581 here")
    options = PrepareOptions(
        (str(tmp_path / "raw.txt"),), tmp_path / "out", tokenizer=tmp_path / "theirs.model"
    )
    summary = prepare(options)
    assert summary.skipped == {"space_symbols": 1}
    assert summary.examples == [f"{tmp_path / 'raw.txt'}: U+2581 becomes a space"]


def test_four_million_characters_without_a_space(tmp_path: Path) -> None:
    text = "abcdefghij" * 400_000
    summary, found = prepared(tmp_path, [as_json(text)])
    assert summary.skipped == {}
    assert found == [text]


def test_a_document_longer_than_an_index_can_say_is_several_sequences(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x", small_tokenizer(), max_sequence=100)
    (document,) = random_documents(1, 1000, 2)
    writer.add(document, text_bytes=1, source="x")
    assert writer.close().documents == 1
    index = read_index(tmp_path / "x.idx")
    assert index.lengths.sum() == len(document)
    assert index.lengths.max() == 100
    assert index.borders.tolist() == [0, len(index.lengths)]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: data[:-1], "truncated"),
        (lambda data: data + b"\0", "longer than it was written"),
    ],
)
def test_a_shard_of_another_size_is_not_opened(damage: Any, why: str, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, random_documents(20, 30))
    file = folder / "train-00000.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=why):
        Corpus.open(folder)


def test_a_flipped_bit_and_an_id_outside_of_the_vocabulary_are_found(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, random_documents(20, 30))
    file = folder / "train-00000.bin"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="block 0"):
        verify(folder)
    file.write_bytes(np.full(len(data) // 2, 60_000, np.uint16).tobytes())
    corpus = Corpus.open(folder)
    with pytest.raises(UserError, match="60000 is not in the vocabulary of 512"):
        corpus.read(0, 5)
