"""Whole runs: the run directory's contract, resuming, layouts, objectives, and every way to go wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs.conftest import Tiny, losses_of, steps_of

pytestmark = pytest.mark.runs


def weights_of(run: Path) -> bytes:
    """The newest checkpoint's data, all files, in order."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return b"".join(p.read_bytes() for p in sorted(newest.glob("*.bin")))


def test_a_run_leaves_everything_that_the_contract_names(tiny: Tiny, whole: Path) -> None:
    for name in ("config.toml", "provenance.json", "metrics.jsonl", "outcome.json", "tokenizer.model"):
        assert (whole / name).is_file(), name
    assert json.loads((whole / "outcome.json").read_text())["state"] == "done"
    records = steps_of(whole)
    assert sorted(records) == list(range(1, 31))
    assert {"loss", "grad_norm", "lr", "tokens", "samples", "time"} <= set(records[30])
    assert records[30]["tokens"] == 30 * 8 * 32
    assert losses_of(whole)[-1] < losses_of(whole)[0] - 0.3
    evaluations = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines() if '"eval"' in x]
    assert [e["step"] for e in evaluations] == [0, 10, 20, 30]
    kept = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert kept == ["step_00000020", "step_00000025", "step_00000030"]


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(tiny: Tiny, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes(), weights_of(whole)
    again = tiny.train(whole)
    assert again.code == 0, again.err
    assert "30" in again.out
    assert "done" in again.out
    assert before == ((whole / "metrics.jsonl").read_bytes(), weights_of(whole))


def test_a_signal_saves_and_the_same_command_continues_to_the_bit(
    tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        tiny.command("train", str(tiny.config), "--run-dir", str(run), "--set", "checkpoint.every_steps=0"),
        env=tiny.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    while time.monotonic() < deadline and len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "preempted"
    assert 0 < outcome["step"] < 30
    assert tiny.train(run, "checkpoint.every_steps=0").code == 0
    assert losses_of(run) == losses_of(whole)
    assert weights_of(run) == weights_of(whole)


# No schedule that depends on the length of the run, and a global batch that grows.
CONSTANT = [
    "optim.schedule=constant",
    "train.eval_every=0",
    "train.batch_ramp_from=4",
    "train.batch_ramp_steps=6",
]


@pytest.fixture(scope="module")
def constant(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process whose learning rate does not depend on how long it is."""
    run = tmp_path_factory.mktemp("constant") / "run"
    done = tiny.train(run, *CONSTANT)
    assert done.code == 0, done.err
    return run


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_processes_draw_the_same_curve_and_continue_on_one(
    tiny: Tiny, constant: Path, tmp_path: Path, zero: int
) -> None:
    run = tmp_path / "run"
    done = tiny.train(run, f"layout.zero={zero}", "train.steps=20", *CONSTANT, processes=2)
    assert done.code == 0, done.err
    assert losses_of(run) == pytest.approx(losses_of(constant)[:20], rel=1e-5)
    assert tiny.train(run, *CONSTANT).code == 0
    assert losses_of(run) == pytest.approx(losses_of(constant), rel=1e-5)


def test_the_global_batch_may_change_and_no_sample_is_lost_or_read_twice(tiny: Tiny, tmp_path: Path) -> None:
    # At a learning rate of almost nothing the loss only tells which samples a step read.
    still = ("optim.lr=1e-12", "train.eval_every=0")
    assert tiny.train(tmp_path / "one", *still, "train.steps=8").code == 0
    assert tiny.train(tmp_path / "two", *still, "train.steps=4").code == 0
    done = tiny.train(tmp_path / "two", *still, "train.steps=12", "train.global_batch=4", processes=2)
    assert done.code == 0, done.err
    assert "train.global_batch: 8 in the run, 4 now" in done.out
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert two[:4] == one[:4]
    halves = [(two[i] + two[i + 1]) / 2 for i in range(4, 12, 2)]
    assert halves == pytest.approx(one[4:], rel=1e-6)
    assert steps_of(tmp_path / "two")[12]["tokens"] == steps_of(tmp_path / "one")[8]["tokens"]


def test_the_clock_asks_for_saves_too(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    by_time = ["checkpoint.every_steps=0", "checkpoint.every_minutes=0.00001", "checkpoint.keep_last=1"]
    assert (
        tiny.train(run, *by_time, "checkpoint.keep_every=2", "train.steps=7", "train.eval_every=0").code == 0
    )
    saved = sorted(p.name for p in (run / "checkpoints").iterdir())
    # 0.6 ms pass in every step, so every step is saved; kept are the newest and the multiples of two.
    assert saved == [f"step_{step:08d}" for step in (2, 4, 6, 7)]


def test_lstm_and_masked_models_train_through_the_same_command(tiny: Tiny, tmp_path: Path) -> None:
    lstm = tiny.train(
        tmp_path / "lstm",
        *("model.kind=lstm", "model.dropout=0.2", "model.tied=false", "optim.kind=sgd", "optim.lr=1.0"),
        "model.heads=none",
        "model.kv_heads=none",
    )
    assert lstm.code == 0, lstm.err
    assert losses_of(tmp_path / "lstm")[-1] < losses_of(tmp_path / "lstm")[0] - 0.1
    masked = tiny.train(tmp_path / "masked", "model.objective=masked", "loss.mask_rate=0.3")
    assert masked.code == 0, masked.err
    assert losses_of(tmp_path / "masked")[-1] < losses_of(tmp_path / "masked")[0] - 0.1


def test_evaluate_gives_what_training_gave(tiny: Tiny, whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["kind"] == "eval"][-1]
    done = tiny("evaluate", str(whole), "--sequences", "8", "--json")
    figures = json.loads(done.out)
    assert figures["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    text = tiny("evaluate", str(whole), "--split", "train", "--sequences", "4").out
    assert "bits per byte" in text
    assert "train" in text


def test_text_of_another_tokenizer_is_refused(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("one two three four five six seven eight nine ten\n" * 200)
    assert tiny("prepare", str(source), "--out", str(tmp_path / "data"), "--vocab-size", "280").code == 0
    refused = tiny("evaluate", str(whole), "--data", str(tmp_path / "data"), "--split", "train")
    assert refused.code == 2
    assert "another tokenizer" in refused.err


def test_generate_takes_every_option(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("class ")
    options = ["--prompt", "def ", "--prompt-file", str(tmp_path / "prompt"), "--samples", "2"]
    options += [
        "--max-new-tokens",
        "10",
        "--temperature",
        "1.0",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--stop",
        "zzz",
    ]
    checkpoint = str(whole / "checkpoints" / "step_00000030")
    texts = [tiny("generate", checkpoint, *options, "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].count("---") == 8, "four continuations, numbered"
    assert tiny("inspect", checkpoint).out.count("embed_tokens.weight") == 1


def test_sixteen_bits_resume_to_the_bit(tiny: Tiny, tmp_path: Path) -> None:
    for precision in ("bf16", "fp16"):
        settings = [f"train.precision={precision}", "optim.schedule=constant", "train.eval_every=0"]
        straight, stopped = tmp_path / f"{precision}-straight", tmp_path / f"{precision}-stopped"
        assert tiny.train(straight, *settings, "train.steps=12").code == 0
        assert tiny.train(stopped, *settings, "train.steps=6").code == 0
        assert tiny.train(stopped, *settings, "train.steps=12").code == 0
        assert losses_of(stopped) == losses_of(straight)
        assert weights_of(stopped) == weights_of(straight)


def test_a_run_directory_that_cannot_be_one(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused = tiny.train(tmp_path / "file")
    assert refused.code == 2
    assert "--run-dir" in refused.err


def test_verbs_on_a_trained_run(tiny: Tiny, whole: Path) -> None:
    text = tiny("generate", str(whole), "--prompt", "def ", "--max-new-tokens", "12", "--temperature", "0")
    assert text.code == 0, text.err
    assert text.out.startswith("def ")
    again = tiny("generate", str(whole), "--prompt", "def ", "--max-new-tokens", "12", "--temperature", "0")
    assert again.out == text.out
    figures = tiny("evaluate", str(whole), "--json")
    assert figures.code == 0, figures.err
    assert 0 < json.loads(figures.out)["bits_per_byte"] < 8
    explained = tiny("inspect", str(whole), "--verify")
    assert explained.code == 0, explained.err
    assert "step_00000030" in explained.out


def test_another_model_is_refused_with_the_difference(tiny: Tiny, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    refused = tiny.train(whole, "model.layers=3")
    assert refused.code == 2
    assert "model.layers" in refused.err
    assert "--fresh" in refused.err
    assert before == (whole / "metrics.jsonl").read_bytes()


def test_checkpoints_of_a_lost_run_directory_are_taken_up_and_others_refused(
    tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    folder = f"checkpoint.folder={tmp_path / 'kept'}"
    shutil.copytree(whole / "checkpoints", tmp_path / "kept")
    refused = tiny.train(tmp_path / "a", folder, "train.seed=5")
    assert refused.code == 2
    assert "is of a run over other samples" in refused.err
    assert "seed: 1 there, 5 here" in refused.err
    done = tiny.train(tmp_path / "b", folder, "train.steps=31")
    assert done.code == 0, done.err
    assert "resumed from step_00000030" in done.out


def test_fresh_moves_the_former_run_aside(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    done = tiny.train(run, "train.steps=3", "model.layers=1", flags=["--fresh"])
    assert done.code == 0, done.err
    assert len(losses_of(run)) == 3
    aside = [p for p in tmp_path.iterdir() if p != run]
    assert len(aside) == 1
    assert losses_of(aside[0]) == losses_of(whole)


def test_steps_that_are_not_finite_are_skipped_and_then_stop_the_run(
    tiny: Tiny, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = weights_of(run)
    failed = tiny.train(
        run,
        "train.steps=60",
        "optim.lr=1e38",
        "optim.min_lr_ratio=1.0",
        "train.max_skipped=3",
        "optim.clip=0",
    )
    assert failed.code == 1, failed.out
    assert "not finite" in failed.err
    assert "not finite" in tiny("inspect", str(run)).out
    assert "samples" in failed.err
    assert "Traceback" not in failed.err
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "failed"
    assert weights_of(run) == before, "the checkpoints saved before are as they were"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_no_space_left_while_saving_is_one_sentence_and_older_checkpoints_stay(
    tiny: Tiny, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(small)], check=False
    ).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        run = small / "run"
        full = tiny.train(run, "checkpoint.keep_last=50")
        assert full.code == 1, full.out
        assert "No space left" in full.err
        assert "Traceback" not in full.err
        kept = sorted(p.name for p in (run / "checkpoints").iterdir())
        assert kept
        assert all("tmp" not in name for name in kept)
        assert tiny("inspect", str(run / "checkpoints" / kept[-1]), "--verify").code == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.vocab_size=100"], ["vocab", "400"]),
        (["data.path=nowhere"], ["nowhere", "bigtrain prepare"]),
        (["train.microbatch=3"], ["microbatch", "fits"]),
        (["data.sequence_length=64", "train.stesp=3"], ["train.stesp", "did you mean train.steps"]),
        (["optim.kind=muon", "layout.engine=zero"], ["muon", "layout.zero = 0"]),
    ],
)
def test_user_errors_leave_with_2_and_one_explanation(
    tiny: Tiny, tmp_path: Path, settings: list[str], words: list[str]
) -> None:
    refused = tiny.train(tmp_path / "run", *settings)
    assert refused.code == 2, (refused.out, refused.err)
    assert "Traceback" not in refused.err
    for word in words:
        assert word in refused.err
    assert not (tmp_path / "run").exists(), "nothing is created for a run that cannot start"


def test_a_damaged_shard_is_named(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    shard = next(data.glob("train-*.bin"))
    sound = shard.read_bytes()
    flipped = bytearray(sound)
    flipped[1000] ^= 1
    for content, word in ((sound[:-10], "truncated"), (bytes(flipped), "altered")):
        shard.write_bytes(content)
        refused = tiny.train(tmp_path / "run", f"data.path={data}")
        assert refused.code == 2
        assert shard.name in refused.err
        assert word in refused.err


LSTM = ["model.kind=lstm", "model.dropout=0.2", "model.tied=false", "model.heads=none", "model.kv_heads=none"]


@pytest.mark.parametrize("settings", [[], [*LSTM, "optim.kind=sgd", "optim.lr=1.0"]])
def test_lr_find_draws_the_curve_and_suggests(tiny: Tiny, tmp_path: Path, settings: list[str]) -> None:
    found = tiny.train(tmp_path / "run", *settings, flags=["--lr-find"])
    assert found.code == 0, found.err
    assert "optim.lr=" in found.out
    assert (tmp_path / "run" / "lr_find.png").read_bytes().startswith(b"\x89PNG")


def test_dry_prints_the_resolved_config_and_what_follows(tiny: Tiny, tmp_path: Path) -> None:
    dry = tiny.train(tmp_path / "run", "optim.lr=none", flags=["--dry"])
    assert dry.code == 0, dry.err
    for word in ("parameters", "FLOPs", "Step Law", "[model]", "tokens"):
        assert word in dry.out
    assert not (tmp_path / "run").exists()
    for setting in ("train.microbatch=3", "model.vocab_size=100"):
        assert tiny.train(tmp_path / "run", setting, flags=["--dry"]).code == 2


def test_the_torchrun_script_passes_a_signal_on_and_every_rank_saves(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    sets = ["--set", "train.steps=100000", "--set", "checkpoint.every_steps=0", "--set", "train.eval_every=0"]
    process = subprocess.Popen(
        ["bash", str(script), str(tiny.config), "--run-dir", str(run), *sets],
        env={
            **tiny.environment(),
            "NPROC": "2",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "preempted", err
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step_{outcome['step']:08d}"]
