"""The verbs: help that teaches, exit code 2 for user errors, no traceback for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.cli import main

VERBS = ["prepare", "train", "generate", "evaluate", "inspect", "quickstart"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 8
    if verb not in ("quickstart",):
        assert "example" in text
        assert f"bigtrain {verb}" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "quikstart"], ["did you mean 'quickstart'"]),
        (["train", "quickstart", "--set", "optim.lrr=1"], ["did you mean optim.lr?"]),
        (["generate", "nowhere"], ["nowhere", "neither a run directory"]),
        (["evaluate", "nowhere"], ["nowhere"]),
        (["inspect", "nowhere"], ["nowhere"]),
        (["prepare", "nowhere", "--out", "x"], ["nowhere"]),
    ],
)
def test_user_errors_leave_with_2_and_teach(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    text = capsys.readouterr().err
    for word in words:
        assert word in text
    assert "Traceback" not in text


def test_unknown_verbs_and_options_leave_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["train"], ["train", "quickstart", "--frehs"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2


def test_prepare_reports_and_inspect_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"line {i}: a b c d e 早上好 {i * i}\n" * 5}) for i in range(40)]
    source.write_text("\n".join([*lines, "{broken", json.dumps({"text": ""})]) + "\n", encoding="utf-8")
    out = tmp_path / "data"
    arguments = [
        "prepare",
        str(source),
        "--out",
        str(out),
        "--vocab-size",
        "290",
        "--validation-fraction",
        "0.1",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "40 documents" not in text  # some are held out
    assert "1 empty" in text
    assert f"{source}:41" in text, "the malformed line is named"
    assert main(["inspect", str(out), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "bytes a token" in text
    assert "sound" in text
    assert main(["inspect", str(next(out.glob("train-*.bin")))]) == 0
    assert "documents" in capsys.readouterr().out
    assert main(["inspect", str(out / "tokenizer.model")]) == 0
    assert "290 pieces" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_inspect_explains_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "llama-8b"]) == 0
    text = capsys.readouterr().out
    assert "8,030,261,248" in text
    assert "FLOPs" in text
