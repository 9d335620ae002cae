"""Cutting a text before BPE gives the ids of the whole text, or is refused."""

from __future__ import annotations

import functools
import io
import random
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bigtrain.data.cuts import LEAST, SPACE, Cuts, cuts_of
from bigtrain.data.tokenizer import Tokenizer
from tests.data_parts import CHINESE, CODE, ENGLISH, HOSTILE, small_tokenizer, texts

LLAMA: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "character_coverage": 0.98,
}
SYMBOLS = ["<|im_start|>", "fox jumps", f"{SPACE}dog", "\n\n", "aaaa", "aa"]
MODELS: dict[str, dict[str, Any]] = {
    "as Llama's, a space in front": LLAMA,
    "as Gemma's, none": {**LLAMA, "add_dummy_prefix": False},
    "no byte fallback": {**LLAMA, "byte_fallback": False},
    "pieces across words": {**LLAMA, "split_by_whitespace": False},
    "pieces across everything": {
        **LLAMA,
        **dict.fromkeys(("split_by_whitespace", "split_by_unicode_script", "split_by_number"), False),
        "max_sentencepiece_length": 40,
    },
    "runs of spaces": {**LLAMA, "allow_whitespace_only_pieces": True},
    "symbols of the user": {**LLAMA, "user_defined_symbols": SYMBOLS},
    "symbols of the user, no byte fallback": {
        **LLAMA,
        "byte_fallback": False,
        "user_defined_symbols": SYMBOLS,
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "SentencePiece's defaults": {},
    "nmt_nfkc": {**LLAMA, "normalization_rule_name": "nmt_nfkc"},
    "fewer spaces": {**LLAMA, "remove_extra_whitespaces": True},
    "spaces behind words": {**LLAMA, "treat_whitespace_as_suffix": True},
    "unigram": {**LLAMA, "model_type": "unigram"},
    "char": {**LLAMA, "model_type": "char", "vocab_size": 350},
    "word": {**LLAMA, "model_type": "word"},
}


@functools.cache
def trained(name: str) -> bytes:
    """A model of about 500 pieces."""
    if name == "our own":
        return small_tokenizer().model
    model = io.BytesIO()
    wanted = {"model_type": "bpe", "vocab_size": 500, **(MODELS | REFUSED)[name]}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts() for line in text.split("\n") if line.strip()),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **wanted,
    )
    return model.getvalue()


@functools.cache
def opened(name: str) -> tuple[Any, Cuts, Any]:
    """The processor of whole texts, the cuts, the processor of parts."""
    cuts = cuts_of(trained(name))
    assert cuts is not None
    whole, parts = (sentencepiece.SentencePieceProcessor(model_proto=m) for m in (trained(name), cuts.model))
    return whole, cuts, parts


def check(name: str, text: str, least: int) -> int:
    """The ids of the parts are those of the text; how many parts there were."""
    whole, cuts, processor = opened(name)
    parts = cuts.parts(cuts.prefix + text if text else "", least)
    assert "".join(parts) == (cuts.prefix + text if text else "")
    assert all(len(part) >= least for part in parts[:-1])
    assert [i for part in parts for i in processor.encode(part)] == whole.encode(text), (name, text, parts)
    return len(parts)


CUT = pytest.mark.parametrize("name", ["our own", *MODELS])


@CUT
@pytest.mark.parametrize("least", [1, 2, 7, LEAST])
def test_prose_code_chinese_and_hostile_text(name: str, least: int) -> None:
    library = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    everything = [ENGLISH, CHINESE, CODE, *HOSTILE, "".join(HOSTILE), *texts()[-20:], library[:30_000]]
    for text in everything:
        check(name, text, least)


@CUT
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_random_text_of_the_vocabulary(name: str, data: st.DataObject) -> None:
    """Of its pieces, its characters, and some that it lacks, cut at every place that is allowed."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained(name))
    pieces = [p.piece for p in proto.pieces]
    letters = sorted({letter for piece in pieces for letter in piece})
    extra = [" ", "  ", SPACE, "\n", "日", "😀", "\0", "aaaaa"]
    choice = st.one_of(*(st.sampled_from(some) for some in (pieces, letters, extra)))
    text = "".join(data.draw(st.lists(choice, max_size=40)))
    check(name, text, data.draw(st.sampled_from([1, 1, 1, 2, 5])))


@CUT
def test_long_random_text(name: str) -> None:
    """Few different letters, so that merges compete and form long chains."""
    choose = random.Random(name)
    letters = sorted({letter for piece in opened(name)[1].joined for letter in piece})
    for _ in range(30):
        some = choose.sample(letters, 6)
        check(name, "".join(choose.choices([*some, " ", "ab"], k=2000)), choose.choice([1, 3, 50]))


@CUT
def test_ordinary_text_is_cut_indeed(name: str) -> None:
    pieces = check(name, ENGLISH * 100, LEAST)
    if name.startswith("pieces across"):
        assert pieces >= 1  # nothing is promised
    else:
        assert pieces > 0.9 * len(ENGLISH * 100) / LEAST


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_not_cut(name: str) -> None:
    assert cuts_of(trained(name)) is None


def edited(name: str, change: Any) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained(name))
    change(proto)
    found: bytes = proto.SerializeToString()
    return found


def test_unused_pieces_and_names_that_are_taken_twice_are_refused() -> None:
    name = "as Gemma's, none"

    def unused(proto: Any) -> None:
        proto.pieces[-1].type = 5

    def twice(proto: Any) -> None:
        proto.pieces[-1].piece = "<unk>"

    def not_a_number(proto: Any) -> None:
        proto.pieces[-1].score = float("nan")

    assert cuts_of(edited(name, lambda proto: None)) is not None
    for change in (unused, twice, not_a_number):
        assert cuts_of(edited(name, change)) is None


def test_both_halves_of_the_rule_are_needed() -> None:
    """The comparison would see a cut inside a merge, and a run of unknown characters taken apart."""
    for name, broken in (
        ("our own", {"joined": frozenset()}),
        ("symbols of the user", {"joined": frozenset()}),
        ("no byte fallback", {"known": None}),
    ):
        whole, cuts, processor = opened(name)
        text = "the dog \u0416\u0429\u042e sleeps fox jumps"
        parts = replace(cuts, **broken).parts(cuts.prefix + text, 1)
        assert [i for part in parts for i in processor.encode(part)] != whole.encode(text), name


@pytest.mark.parametrize("name", ["our own", *MODELS, *REFUSED])
def test_the_tokenizer_gives_the_ids_of_the_library(name: str, tmp_path: Path) -> None:
    """Long and short texts in one batch; not U+2581, which our own models keep."""
    (tmp_path / "x.model").write_bytes(trained(name))
    tokenizer = Tokenizer.load(tmp_path / "x.model")
    direct = sentencepiece.SentencePieceProcessor(model_proto=trained(name))
    everything = [t for t in (*HOSTILE, ENGLISH * 20, "x", CHINESE * 20, CODE * 20) if SPACE not in t]
    for batch in (everything, ["short", "", " two "]):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            assert ids.dtype == np.int32
            assert ids.tolist() == direct.encode(text), text[:50]


def test_a_text_that_cannot_be_cut_takes_time_by_its_length_only() -> None:
    cuts = Cuts(b"", "", frozenset({"aa"}), None)
    assert cuts.parts("a" * 1_000_000) == ["a" * 1_000_000]
    assert cuts.parts("") == []
    assert cuts.parts("aab" * 3, 2) == ["aa", "baa", "baa", "b"]
