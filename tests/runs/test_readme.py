"""The README's commands are run as they stand, only shorter; so are `make quickstart`'s steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.runs.conftest import Result, Tiny

pytestmark = pytest.mark.runs
ROOT = Path(__file__).parents[2]
SHORT = ["--set", "train.steps=4", "--set", "train.eval_every=0", "--set", "optim.warmup_steps=1"]


def readme_commands() -> list[list[str]]:
    """Every command line in the README's shell blocks, comments removed."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def run_in(folder: Path, tiny: Tiny, arguments: list[str]) -> Result:
    environment = {**tiny.environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-m", "bigtrain", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def test_the_readme_names_only_commands_that_exist() -> None:
    known = {"make", ".", "bigtrain", "torchrun"}
    commands = readme_commands()
    assert {command[0] for command in commands} == known
    targets = {command[1] for command in commands if command[0] == "make"}
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"quickstart", "test"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_readme_commands_on_ones_own_text_work_in_order(tiny: Tiny, tmp_path: Path) -> None:
    texts = tmp_path / "my_texts"
    texts.mkdir()
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.glob("*.py"))[:60]:
        shutil.copy(source, texts)
    ran = 0
    for program, *arguments in readme_commands():
        if program == "torchrun":
            arguments = [*arguments[arguments.index("bigtrain") + 1 :], "--dry"]
        elif program != "bigtrain":
            continue
        if arguments[0] == "train" and "--lr-find" in arguments:
            arguments = ["--dry" if a == "--lr-find" else a for a in arguments]
        if arguments[0] == "train" and "--dry" not in arguments:
            arguments += SHORT
        done = run_in(tmp_path, tiny, arguments)
        assert done.code == 0, (arguments, done.err)
        ran += 1
    assert ran >= 7
    assert json.loads((tmp_path / "runs/mine/outcome.json").read_text())["state"] == "done"


def test_the_quickstart_goes_all_the_way(tiny: Tiny, tmp_path: Path) -> None:
    short = ["--set", "train.steps=24", "--set", "train.eval_every=12", "--set", "optim.warmup_steps=1"]
    done = run_in(tmp_path, tiny, ["quickstart", *short, "--set", "train.eval_sequences=8"])
    assert done.code == 0, done.err
    for words in (
        "Before training",
        "After training",
        "bits per byte",
        "go on",
        "loss.png",
        "--set train.steps",
    ):
        assert words.lower() in done.out.lower(), words
    run = tmp_path / "runs" / "quickstart"
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [r["bits_per_byte"] for r in records if r["kind"] == "eval"]
    assert figures[-1] < figures[0] - 0.2, "twenty-four steps already show"
    assert (run / "samples" / "after.txt").read_text(encoding="utf-8")
    resume = [line for line in done.out.splitlines() if line.startswith("train longer")]
    arguments = shlex.split(resume[0].split("bigtrain", 1)[1].replace("train.steps=6000", "train.steps=26"))
    again = run_in(tmp_path, tiny, arguments)
    assert again.code == 0, again.err
    assert "resumed from step_00000024" in again.out
    assert os.path.getsize(run / "metrics.jsonl") > 0
