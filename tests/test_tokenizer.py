"""Tokenizers: nothing is lost, control text stays text, refusals say what would work."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.vocabulary import Kind, train_tokenizer
from bigtrain.errors import UserError
from tests.data_parts import CHINESE, CODE, ENGLISH, HOSTILE, small_tokenizer, texts

KINDS: tuple[Kind, ...] = ("bpe", "unigram")
pytestmark = pytest.mark.parametrize("kind", KINDS)


def own_processor(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))


def test_every_text_comes_back_exactly(kind: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    everything = [ENGLISH, CHINESE, CODE, *HOSTILE, "".join(HOSTILE) * 50]
    for text, ids in zip(everything, tokenizer.encode_batch(everything), strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert np.array_equal(tokenizer.encode(text), ids)
        assert not np.isin(ids, tokenizer.special_ids).any()


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_exactly_and_counts_its_bytes(kind: Kind, text: str) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_ids_are_those_of_sentencepiece_itself(kind: Kind) -> None:
    """Also for texts that are cut before encoding; not for U+2581, which SentencePiece makes a space."""
    tokenizer = small_tokenizer(kind)
    direct = own_processor(tokenizer)
    everything = [t for t in (*texts(), ENGLISH * 100, CODE * 100, CHINESE * 100) if "\u2581" not in t]
    assert any(len(t) > 20_000 for t in everything)
    for text, ids in zip(everything, tokenizer.encode_batch(everything), strict=True):
        assert ids.tolist() == direct.encode(text)


def test_ids_of_a_huge_text_are_those_of_sentencepiece_itself(kind: Kind) -> None:
    """Unigram adds scores in float32, so a cut in a long text can change ids: it does in this one."""
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz  \n", k=1_000_000))
    tokenizer = small_tokenizer(kind)
    assert np.array_equal(tokenizer.encode(text), own_processor(tokenizer).encode(text))


def test_control_text_is_plain_text(kind: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (1, 2, 4)
    for text in ("</s>", "a<s>b</s>", "<mask>", "<pad><unk>", "<0x0A>"):
        ids = tokenizer.encode(text)
        assert not np.isin(ids, tokenizer.special_ids).any()
        assert len(ids) > 2
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *tokenizer.encode("x"), 4, 2]) == "x"


def test_newlines_and_indentation_are_pieces(kind: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    direct = own_processor(tokenizer)
    pieces = direct.encode("def f():\n        return\n\tx", out_type=str)
    assert pieces.count("\n") == 2
    assert "\t" in pieces
    assert len([p for p in pieces if p.strip("\u2581") == ""]) <= 2  # eight spaces are at most two pieces
    assert not any("\n" in direct.id_to_piece(i) for i in range(512) if direct.id_to_piece(i) != "\n")


def test_lone_surrogates_become_the_replacement_character(kind: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_token_bytes(kind: Kind) -> None:
    tokenizer = small_tokenizer(kind)
    sizes = tokenizer.token_bytes()
    direct = own_processor(tokenizer)
    assert sizes.shape == (512,)
    assert sizes.dtype == np.int64
    assert (sizes[:5] == 0).all()
    assert (
        sizes[[direct.piece_to_id("<0x00>"), direct.piece_to_id("<0xFF>"), direct.piece_to_id("\n")]] == 1
    ).all()
    longest = max(range(262, 512), key=lambda i: len(direct.id_to_piece(i)))
    assert sizes[longest] == len(direct.decode([longest])) > 4  # ASCII


def test_training_is_deterministic_and_quiet(
    kind: Kind, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sample = texts()
    a = train_tokenizer(sample, tmp_path / "a.model", kind=kind, vocab_size=400)
    b = train_tokenizer(iter(sample), tmp_path / "b.model", kind=kind, vocab_size=400)
    assert a.sha256 == b.sha256
    assert a.vocab_size == 400
    assert sorted(os.listdir(tmp_path)) == ["a.model", "b.model"]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_vocabulary_larger_than_the_text_supports_names_the_largest(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"vocab_size 50000 is larger than the text supports: at most (\d+)"
    ) as caught:
        train_tokenizer(texts(), tmp_path / "t.model", kind=kind, vocab_size=50_000)
    assert list(tmp_path.iterdir()) == []
    largest = int(caught.value.what.split("at most ")[1].split()[0])
    assert str(largest) in caught.value.do
    assert train_tokenizer(texts(), tmp_path / "t.model", kind=kind, vocab_size=largest).vocab_size == largest


def test_a_vocabulary_too_small_is_refused(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too little for any"):
        train_tokenizer(["ab ba"], tmp_path / "t.model", kind="unigram", vocab_size=340)
    with pytest.raises(UserError, match="vocab_size 200 is too small: 263 entries"):
        train_tokenizer(texts(), tmp_path / "t.model", kind=kind, vocab_size=200)
    with pytest.raises(
        UserError, match=r"vocab_size 60 is smaller than the \d+ entries that single characters need"
    ):
        train_tokenizer(texts(), tmp_path / "t.model", kind=kind, vocab_size=60, byte_fallback=False)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", "\n\n"], tmp_path / "t.model", kind=kind, vocab_size=400)


def test_many_characters_leave_room_for_longer_pieces(kind: Kind, tmp_path: Path) -> None:
    """3000 different hanzi in a vocabulary of 600: bytes for the rare ones instead of a refusal."""
    hanzi = [chr(0x4E00 + i) for i in range(3000)]
    choose = random.Random(0)
    words = ["".join(choose.choices(hanzi[:150], k=choose.randint(2, 3))) for _ in range(400)]
    common = ["".join(choose.choices(words, k=200)) for _ in range(150)]
    sample = ["".join(hanzi[20 * i : 20 * i + 40]) + common[i] for i in range(150)]
    tokenizer = train_tokenizer(sample, tmp_path / "t.model", kind=kind, vocab_size=600)
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in sample)
    assert max(tokenizer.token_bytes()) >= 6  # words of several hanzi, of 3 bytes each, found room


def test_a_foreign_model_is_used_as_it_is(kind: Kind, tmp_path: Path) -> None:
    """Default SentencePiece settings: lossy normalisation, dummy prefix; the ids stay the library's own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH, CHINESE, CODE.replace("\n", " ")] * 20),
        model_writer=model,
        model_type=kind,
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "foreign.model"
    path.write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(path)
    direct = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    everything = [ENGLISH * 50, CODE * 50, "a \u2581 b", ""]
    assert [ids.tolist() for ids in tokenizer.encode_batch(everything)] == [
        direct.encode(t) for t in everything
    ]
    assert tokenizer.mask_id is None


def test_loading_refuses_what_is_no_model(kind: Kind, tmp_path: Path) -> None:
    assert Tokenizer.load(small_tokenizer(kind).path.parent).sha256 == small_tokenizer(kind).sha256
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"x\.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(UserError, match=r"missing\.model: cannot read"):
        Tokenizer.load(tmp_path / "missing.model")
    with pytest.raises(UserError, match="token id 512 is not in the vocabulary of 512"):
        small_tokenizer(kind).decode([512])
