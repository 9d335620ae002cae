"""Faster encoders give SentencePiece's ids, or are not used, and that is said."""

from __future__ import annotations

import importlib.util
import io
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.cli import main
from bigtrain.data import encoders
from bigtrain.data.encoders import FASTEST, choose, difference, use
from bigtrain.data.manifest import read_manifest
from bigtrain.data.tokenizer import Tokenizer, Tokens
from bigtrain.errors import UserError
from tests.data_parts import CHINESE, CODE, ENGLISH, HOSTILE, small_tokenizer, texts
from tests.test_crew import content

INSTALLED = [
    pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name} here")
    )
    for name in FASTEST
]


def fresh() -> Tokenizer:
    return Tokenizer.load(small_tokenizer().path)


@pytest.mark.parametrize("name", INSTALLED)
def test_the_same_ids_on_prose_code_chinese_and_hostile_text(name: encoders.Name) -> None:
    tokenizer = fresh()
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:25]
    sample = [*texts(), ENGLISH, CHINESE * 30, CODE, *HOSTILE, *(p.read_text() for p in library)]
    expected = tokenizer.encode_batch(sample)
    use(tokenizer, name)
    assert tokenizer.encoder is not None
    found = tokenizer.encode_batch(sample, threads=1)
    for text, a, b in zip(sample, expected, found, strict=True):
        assert a.tolist() == b.tolist(), text[:80]
        assert b.dtype == np.int32
    assert difference(tokenizer, sample) is None
    assert tokenizer.encoder is not None, "the test leaves it as it was"
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("name", INSTALLED)
@given(st.text(st.sampled_from("abd </s>\n\t▁<mask>世界é0x😀"), max_size=60))
@settings(max_examples=150, deadline=None)
def test_random_text(name: encoders.Name, text: str) -> None:
    tokenizer = cached(name)
    assert tokenizer.encode(text).tolist() == small_tokenizer().encode(text).tolist()


CACHE: dict[str, Tokenizer] = {}


def cached(name: encoders.Name) -> Tokenizer:
    if name not in CACHE:
        CACHE[name] = fresh()
        use(CACHE[name], name)
    return CACHE[name]


def test_one_that_differs_anywhere_is_not_used_and_the_place_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = fresh()

    def wrong(made: Tokenizer, name: str) -> encoders.Encode:
        def encode(given: Sequence[str], threads: int) -> list[Tokens]:
            found = made.by_sentencepiece(given, threads)
            return [ids[::-1] if "brown fox" in text else ids for text, ids in zip(given, found, strict=True)]

        return encode

    monkeypatch.setattr(encoders, "_made", wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    told: list[str] = []
    assert choose("auto", tokenizer, ["no such animal"], told.append) == "gigatoken"
    assert told == []
    assert choose("auto", tokenizer, ["fine", ENGLISH], told.append) == "sentencepiece"
    assert [t.split(" is not used: it gives other ids than SentencePiece near ")[0] for t in told] == list(
        FASTEST[:2]
    )
    assert tokenizer.encoder is None
    monkeypatch.setattr(encoders, "_made", lambda made, name: lambda given, threads: 1 / 0)
    assert choose("kitoken", tokenizer, [], told.append) == "sentencepiece"
    assert "fails on this text (ZeroDivisionError" in told[-1]


def test_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FASTEST:
        monkeypatch.setitem(__import__("sys").modules, name, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told: list[str] = []
    assert choose("auto", fresh(), [], told.append) == "sentencepiece"
    assert told == []
    with pytest.raises(UserError, match="kitoken is not installed"):
        choose("kitoken", fresh(), [], told.append)


def test_one_that_lacks_what_it_needs_is_an_error_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in ("awkward", *FASTEST):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    told: list[str] = []
    with pytest.raises(UserError, match="gigatoken is not installed"):
        choose("gigatoken", fresh(), [], told.append)
    assert choose("auto", fresh(), [], told.append) == "sentencepiece"
    assert len(told) == 2


@pytest.mark.parametrize("name", INSTALLED)
def test_pieces_of_the_user_that_the_sample_lacks_are_tried(name: encoders.Name, tmp_path: Path) -> None:
    """gigatoken takes "zq xj" for a piece of the user; SentencePiece, which sees U+2581 for the space, does not."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts() for line in text.split("\n") if line.strip()),
        model_writer=model, model_type="bpe", vocab_size=500, hard_vocab_limit=False, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98,
        user_defined_symbols=["zq xj", "qq"], minloglevel=2,
    )  # fmt: skip
    (tmp_path / "theirs.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer.load(tmp_path / "theirs.model")
    told: list[str] = []
    sample = texts()
    assert not any("zq xj" in text for text in sample)
    chosen = choose(name, tokenizer, sample, told.append)
    assert (chosen == name) == (told == [])
    expected = tokenizer.encode_batch(["zq xj", "a zq xjqqq"])
    use(tokenizer, chosen)
    for a, b in zip(expected, tokenizer.encode_batch(["zq xj", "a zq xjqqq"]), strict=True):
        assert a.tolist() == b.tolist()


@pytest.mark.parametrize("name", INSTALLED)
def test_prepare_writes_the_same_shards(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": text}) for text in [*texts(), *HOSTILE]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    command = [
        "prepare",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        str(small_tokenizer().path),
        "--unit-mb",
        "0.01",
    ]
    shards = []
    for encoder in ("sentencepiece", name):
        out = tmp_path / encoder
        assert main([*command, "--out", str(out), "--encoder", encoder, "--workers", "2"]) == 0
        assert read_manifest(out).summary["encoder"] == encoder
        files = content(out)
        del files["dataset.json"]
        shards.append(files)
    assert shards[0] == shards[1]
    assert f"encoder          {name}, which gave" in capsys.readouterr().out
    assert main([*command, "--out", str(tmp_path / name)]) == 0, "it is the same corpus"
    assert "nothing to do" in capsys.readouterr().out
