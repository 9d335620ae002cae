"""The verbs: help that teaches, exit code 2 for user errors, no traceback for people."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bigtrain import cli
from bigtrain.cli import main
from bigtrain.configfile import find_config, load
from bigtrain.data.manifest import read_manifest
from tests.data_parts import random_documents, write_corpus

VERBS = ["prepare", "plan", "train", "generate", "evaluate", "inspect", "export", "import", "quickstart"]


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
        (["export", "nowhere", "--to", "x"], ["nowhere", "neither a run directory"]),
        (["import", "nowhere"], ["nowhere", "is no folder"]),
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


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_prepare_takes_every_kind_of_input(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    chinese = "大型语言模型需要大量的文本。今天天气很好，我们去公园散步。\n"  # noqa: RUF001
    mixed = "Training 训练 is 是 fun 有趣! \U0001f600 naïve café\n"
    (texts / "a.md").write_text(chinese * 40, encoding="utf-8")
    (texts / "b.txt").write_text(mixed * 40, encoding="utf-8")
    (texts / "c.py").write_text(Path(json.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    rows = "".join(json.dumps({"text": f"row {i} {mixed}"}, ensure_ascii=False) + "\n" for i in range(30))
    with gzip.open(texts / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(rows)
    (texts / "e.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [chinese, mixed] * 10}), texts / "f.parquet")
    common = ["--tokenizer-kind", kind, "--vocab-size", "340", "--validation-fraction", "0.1"]
    assert main(["prepare", str(texts), "--out", str(tmp_path / "all"), *common]) == 0
    glob = str(texts / "*.jsonl.*")
    model = str(tmp_path / "all" / "tokenizer.model")
    assert main(["prepare", glob, "--out", str(tmp_path / "some"), "--tokenizer", model]) == 0
    assert capsys.readouterr().out.count("vocabulary 340") == 2
    documents = read_manifest(tmp_path / "all").splits
    assert sum(s.documents for shards in documents.values() for s in shards) == 3 + 30 + 30 + 20
    assert main(["inspect", str(tmp_path / "some"), "--verify"]) == 0


def test_a_damaged_shard_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path, random_documents(5, 50))
    shard = tmp_path / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main(["inspect", str(shard)]) == 2
    assert "truncated" in capsys.readouterr().err


def test_examples_in_the_help_name_configs_that_exist() -> None:
    text = Path(cli.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"bigtrain train ([a-z0-9][a-z0-9.-]*)", text))
    assert {"quickstart", "lstm"} <= names
    for name in names:
        assert find_config(name).is_file()
    size = int(re.findall(r"--out data/mine --vocab-size (\d+)", text)[0])
    assert size <= load(find_config("quickstart")).model.vocab_size


def test_inspect_explains_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "llama-8b"]) == 0
    text = capsys.readouterr().out
    assert "8,030,261,248" in text
    for word in ("FLOPs", "tokens a parameter", "on disk"):
        assert word in text
