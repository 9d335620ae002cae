"""Conversations: only responses are targets, markers are plain text, bad ones are counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.cli import main
from bigtrain.data.chats import TEMPLATES, ChatFormat, Template, template_of
from bigtrain.data.corpus import Corpus, verify
from bigtrain.data.loader import Loader
from bigtrain.data.packing import pack_corpus
from bigtrain.data.prepare import PrepareOptions, prepare
from bigtrain.data.samples import BestFit, Samples
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError
from bigtrain.model.batch import IGNORE
from tests.data_parts import CHINESE, CODE, small_tokenizer

ANSWERS = (
    "It is </s> <s> <|im_end|> 42.",
    CODE,
    CHINESE,
    "\ud800 broken, \u2581 kept",
    "  leading and trailing  ",
    "x",
)


def chat(*turns: str, system: str = "") -> list[dict[str, str]]:
    """User and assistant in turn."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def test_segments_of_a_conversation() -> None:
    made = ChatFormat(chat_key="m").segments(
        {"m": chat("Hi", "Hello", "And?", "So.", "Bye", system="Be kind.")}
    )
    assert made == (
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("Hello<|im_end|>\n", True),
        ("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n", False),
        ("So.<|im_end|>\n", True),
        ("<|im_start|>user\nBye<|im_end|>\n", False),
    )
    pair = ChatFormat(prompt_key="p", response_key="r", template=TEMPLATES["none"])
    assert pair.segments({"p": "2 + 2 =", "r": " 4"}) == (("2 + 2 =", False), (" 4", True))
    assert pair.segments({"p": "", "r": "unasked"}) == (("unasked", True),)
    assert ChatFormat("", "p", "r", TEMPLATES["plain"]).segments({"p": "a", "r": "b"}) == (
        ("User: a\n\nAssistant: ", False),
        ("b\n\n", True),
    )


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"text": "x"}, "no list of messages under 'm', only 'text'"),
        ({"m": "x"}, "no list of messages"),
        ({"m": []}, "no message of an assistant"),
        ({"m": chat("Hi")}, "no message of an assistant"),
        ({"m": ["Hi"]}, "message 1 has no text under 'content'"),
        ({"m": [{"role": "user", "content": None}]}, "message 1 has no text"),
        (
            {"m": [{"role": "tool", "content": "x"}]},
            "message 1 has role 'tool'; known are system, user, assistant",
        ),
        ({"m": [{"content": "x"}]}, "message 1 has role 'None'"),
        ({"m": chat("Hi", "")}, "message 2: the response is empty"),
        (
            {"m": [*chat("Hi", "Ho"), {"role": "assistant", "content": "x"}]},
            "message 3 (assistant) follows assistant",
        ),
        (
            {"m": [*chat("Hi", "Ho"), {"role": "system", "content": "x"}]},
            "message 3 (system) follows assistant",
        ),
    ],
)
def test_unusable_conversations(value: dict[str, Any], why: str) -> None:
    found = ChatFormat(chat_key="m").segments(value)
    assert isinstance(found, str)
    assert why in found


def test_unusable_pairs() -> None:
    pair = ChatFormat(prompt_key="p", response_key="r")
    assert "no text under 'r', only 'p'" in pair.segments({"p": "x"})
    assert pair.segments({"p": "x", "r": ""}) == "'r' is empty"
    assert "no text under 'p'" in pair.segments({"p": 3, "r": "x"})


def test_templates_from_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'system={before="", after=""}\nuser={before="Q: ", after=""}\n[assistant]\nbefore="A: "\nafter="!"'
    )
    assert template_of(str(file)) == Template(("", ""), ("Q: ", ""), ("A: ", "!"))
    file.write_text('[system]\nbefore=1\nafter=""\n[usr]\n[assistant]\nbefore="x"\n')
    with pytest.raises(UserError) as e:
        template_of(str(file))
    for text in (
        "unknown section [usr]",
        "[system] before and after must be strings",
        "[user] needs",
        "[assistant] needs",
    ):
        assert text in str(e.value)
    with pytest.raises(UserError, match="chatml"):
        template_of("llama9")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Conversations with every answer, and three bad lines."""
    lines = [
        json.dumps({"m": chat(f"Question {i}?", answer, "More?", f"No {i}")})
        for i, answer in enumerate(ANSWERS)
    ]
    lines += ['{"m": []}', '{"m": [{"role": "robot", "content": "x"}]}', '{"text": "plain"}']
    (tmp_path / "chats.jsonl").write_text("\n".join(lines * 3))
    return tmp_path / "chats.jsonl"


def options(raw: Path, out: Path, **more: Any) -> PrepareOptions:
    base = {"chat_key": "m", "tokenizer": small_tokenizer().path, "validation_fraction": 0.0, "max_bad": 0.5}
    return PrepareOptions((str(raw),), out, **{**base, **more})


def test_exactly_the_responses_are_learned(raw: Path, tmp_path: Path) -> None:
    summary = prepare(options(raw, tmp_path / "out", shuffle_mb=0))
    assert summary.skipped["bad_lines"] == 9
    assert any("known are system, user, assistant" in example for example in summary.examples)
    corpus, tokenizer = Corpus.open(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    assert corpus.masked
    tokens, mask = corpus.read(0, corpus.num_tokens), corpus.read_mask(0, corpus.num_tokens)
    ends = np.flatnonzero(tokens == tokenizer.eos_id) + 1
    assert len(ends) == 3 * len(ANSWERS), "the text </s> ends nothing"
    assert (tokens == tokenizer.bos_id).sum() == len(ends)
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        learned = tokenizer.decode(tokens[start:end][mask[start:end]])
        answer = ANSWERS[i % len(ANSWERS)].replace("\ud800", "\ufffd")
        assert learned == f"{answer}<|im_end|>\nNo {i % len(ANSWERS)}<|im_end|>\n"
        assert mask[end - 1], "EOS behind a response is learned"
        assert not mask[start], "BOS is not"
    for start in range(0, 60, 7):  # any bits
        assert corpus.read_mask(start, 50).tolist() == mask[start : start + 50].tolist()
    assert verify(tmp_path / "out") > 0


def test_the_loader_has_no_other_targets(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(options(raw, out))
    corpus = Corpus.open(out)
    pack_corpus(out, 64)
    mask = corpus.read_mask(0, corpus.num_tokens)
    learned = 0
    samples = Samples({"c": corpus}, Samples.single(corpus, 64, 1).blend.stages, [64], 1, cut=BestFit)
    for g in range(samples.epoch(0, 0)):
        batch = Loader(samples, seed=1).batch([g])
        at = 0
        for piece in samples.rows([g])[0]:
            for i in range(piece.size):
                target, place = int(batch.targets[0, at + i]), piece.start + i + 1
                last = int(batch.tokens[0, at + i]) == corpus.eos_id
                assert target == (IGNORE if last or not mask[place] else corpus.read(place, 1)[0])
            at += piece.size
        learned += batch.counted()
    assert learned == mask.sum(), "each once an epoch"


def test_any_workers_write_the_same_masks(raw: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        prepare(options(raw, tmp_path / str(workers), workers=workers, unit_mb=0.0005, max_bad=1.0))
    files = [{f.name: f.read_bytes() for f in sorted((tmp_path / str(w)).iterdir())} for w in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
    assert len([name for name in files[0] if name.endswith(".mask")]) > 3


def test_damaged_and_lost_masks_are_found(raw: Path, tmp_path: Path) -> None:
    prepare(options(raw, tmp_path / "out"))
    mask = tmp_path / "out" / "train-00000.mask"
    data = bytearray(mask.read_bytes())
    data[3] ^= 1
    mask.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000\.mask: was altered"):
        verify(tmp_path / "out")
    mask.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"train-00000\.mask: has .* truncated"):
        Corpus.open(tmp_path / "out")
    mask.unlink()
    with pytest.raises(UserError, match=r"train-00000\.mask: the shard is missing"):
        Corpus.open(tmp_path / "out")


def test_what_the_command_line_refuses(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["prepare", str(raw), "--out", str(tmp_path / "out"), "--tokenizer", str(small_tokenizer().path)]
    for more, text in (
        (["--prompt-key", "p"], "--prompt-key and --response-key together"),
        (["--chat-key", "m", "--prompt-key", "p", "--response-key", "r"], "name one or the other"),
        (["--chat-template", "plain"], "is for conversations"),
        (["--chat-key", "m", "--chat-template", "nowhere"], "nowhere: is no chat template"),
        (["--chat-key", "m"], "unusable, more than the 10% allowed"),
    ):
        assert main([*base, *more]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert main([*base, "--chat-key", "m", "--chat-template", "plain", "--max-bad", "0.5"]) == 0
    assert main([*base, "--chat-key", "m", "--chat-template", "chatml", "--max-bad", "0.5"]) == 2
    assert "prepared with another chat_template" in capsys.readouterr().err


def test_plain_text_beside_conversations_is_learned_whole(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("plain words")
    prepare(
        PrepareOptions(
            (str(raw), str(tmp_path / "note.txt")),
            tmp_path / "out",
            chat_key="m",
            tokenizer=small_tokenizer().path,
            validation_fraction=0.0,
            max_bad=0.5,
            shuffle_mb=0,
        )
    )
    corpus, tokenizer = Corpus.open(tmp_path / "out"), small_tokenizer()
    size = len(tokenizer.encode("plain words")) + 2
    assert corpus.read_mask(corpus.num_tokens - size, size).all()
