"""The verb: what it says, in what time it could, and what it says of input that cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cli import main
from bigtrain.configfile import find_config, load
from bigtrain.plan.dryrun import dry_run
from bigtrain.plan.estimate import estimate
from bigtrain.plan.flops import flops_per_token, parameters
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import job_of
from bigtrain.plan.memory import StageMemory
from bigtrain.plan.planning import enough, to_json
from bigtrain.plan.telling import stage_rows, tell


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == code
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_numbers_that_follow_from_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "llama-8b", "--gpus", "64", "--price", "2.5", "--tokens", "1T")
    config = load(find_config("llama-8b"))
    assert told["parameters"] == parameters(config.model)
    assert told["flops_per_token"]["training"] == flops_per_token(config.model, 8192).training
    step = told["step_seconds"]
    assert sum(step["parts"].values()) == pytest.approx(step["point"])
    speed = 4194304 / step["point"] / 64
    assert told["tokens_per_second_per_gpu"]["point"] == pytest.approx(speed)
    peak = cluster_of("h100", 64).gpu.flops("bf16")
    assert told["mfu"]["point"] == pytest.approx(speed * told["flops_per_token"]["training"] / peak)
    assert told["mfu_visible"]["point"] < told["mfu"]["point"] < told["hfu"]["point"]  # all blocks recomputed
    hours = told["days"]["point"] * 24 * 64
    assert told["gpu_hours"]["point"] == pytest.approx(hours)
    assert told["cost"]["point"] == pytest.approx(2.5 * hours)
    assert told["tokens"] == 10**12
    assert told["checkpoint"]["bytes"] == 12 * told["parameters"]
    for stage in told["memory"]:
        kinds = sum(value for kind, value in stage.items() if kind != "total")
        assert kinds == pytest.approx(stage["total"]["point"])
    for key in ("step_seconds", "tokens_per_second_per_gpu", "mfu", "hfu", "days", "gpu_hours", "cost"):
        assert told[key]["low"] < told[key]["point"] < told[key]["high"]


def test_a_later_stage_of_longer_sequences_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    later = ("--set", "data.stages.long.sample=1000", "--set", "data.stages.long.sequence_length=16384")
    longer = ("--set", "model.max_length=16384")
    staged = planned(capsys, "llama-8b", "--gpus", "64", *longer, *later)
    whole = planned(capsys, "llama-8b", "--gpus", "64", *longer, "--set", "data.sequence_length=16384")
    for key in ("memory", "flops_per_token", "step_seconds"):
        assert staged[key] == whole[key]
    assert main(["plan", "llama-8b", "--gpus", "64", *longer, *later]) == 0
    assert "planned for the longest sequences; [data.stages] has also 8192" in capsys.readouterr().out
    tiny = [part.replace("16384", "512") for part in later]
    config = load(find_config("quickstart"), [tiny[1], tiny[3], "model.max_length=512"])
    assert dry_run(config, 1).config.data.sequence_length == 512


def test_every_stage_of_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("--set", "layout.pipeline=4", "--set", "layout.tensor=4", "--set", "layout.zero=1")
    told = planned(capsys, "llama-8b", "--gpus", "64", *layout)
    assert len(told["memory"]) == 4
    assert told["memory"][0]["activations"] > told["memory"][3]["activations"]
    assert told["step_seconds"]["parts"]["bubble"] > 0
    assert main(["plan", "llama-8b", "--gpus", "64", *layout]) == 0
    text = capsys.readouterr().out
    for word in (
        "stage 0",
        "stage 3",
        "bubble",
        "MFU",
        "HFU",
        "fits",
        "Young",
        "Step Law",
        "tokens a parameter",
    ):
        assert word in text


def test_auto_lays_out_and_tells_why_others_lose(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "llama-1b", "--gpus", "16", "--layout", "auto")
    best = told["search"]["best"]
    assert [b["step_seconds"]["point"] for b in best] == sorted(b["step_seconds"]["point"] for b in best)
    assert told["step_seconds"]["point"] == best[0]["step_seconds"]["point"]
    assert main(["plan", "llama-1b", "--gpus", "16", "--set", "layout=auto"]) == 0
    text = capsys.readouterr().out
    assert "layouts compared" in text
    assert "1. " in text
    assert "2. " in text


def test_stages_that_need_the_same_share_a_row() -> None:
    one, other = StageMemory(1e9, 0, 0, 0, 0, 0, 0), StageMemory(2e9, 0, 0, 0, 0, 0, 0)
    rows = [name for name, _, _ in stage_rows([one, other, other, other], [None] * 4)]  # type: ignore[list-item]
    assert rows == ["stage 0", "stages 1-3"]


def test_a_layout_that_cannot_be_names_one_that_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-8b", "--gpus", "1024"]) == 2
    error = capsys.readouterr().err
    assert "512 sequences do not divide" in error
    assert "runs and fits: " in error


def test_a_layout_too_large_for_the_card_says_what_would_fit(capsys: pytest.CaptureFixture[str]) -> None:
    told = planned(capsys, "llama-8b", "--gpus", "8", "--set", "layout.zero=0", code=1)
    assert not told["fits"]
    assert "GiB" in told["would_fit"]
    assert main(["plan", "llama-8b", "--gpus", "8", "--set", "layout.zero=0"]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "would fit" in text


def test_a_model_larger_than_the_cluster_says_how_many_gpus_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = planned(capsys, "llama-405b", "--gpus", "8", "--layout", "auto", code=1)
    assert "the smallest layout here needs" in told["would_fit"]
    config = load(find_config("llama-405b"))
    more = enough(config, cluster_of("h100", 8))
    assert more is not None
    assert f"{more[0]:,} x h100" in told["would_fit"]
    assert more[0] * 79 * 2**30 > 4 * parameters(config.model)


def test_the_lesson_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Its time has no measurement behind it and says so by its interval; rules for AdamW are not SGD's."""
    assert main(["plan", "lstm", "--gpus", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == 2_103_296
    step = told["step_seconds"]
    assert step["low"] * 3 < step["point"] < step["high"] / 3
    assert told["fits"]
    assert main(["plan", "lstm", "--budget", "3gpuh"]) == 0
    text = capsys.readouterr().out
    assert "lr = 3.0" in text
    assert "published rules are AdamW's" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to plan", "--budget"]),
        (["llama-8b"], ["how many GPUs", "--gpus 64"]),
        (["llama-8b", "--gpus", "8", "--gpu", "potato"], ["potato", "h100", "--hardware"]),
        (["llama-8b", "--gpus", "8", "--network", "carrier pigeon"], ["pigeon", "--hardware"]),
        (["llama-8b", "--gpus", "8", "--tokens", "lots"], ["--tokens", "15T"]),
        (["llama-8b", "--gpus", "8", "--price", "free"], ["--price"]),
        (["llama-80b", "--gpus", "8"], ["did you mean"]),
        (["lstm", "--gpus", "1", "--dry-run"], ["cuDNN", "without --dry-run"]),
        (
            ["llama-1b", "--gpus", "8", "--dry-run", "--set", 'layout.offload="optimizer"'],
            ["host memory", "without --dry-run"],
        ),
        (["--budget", "5000"], ["no unit", "5000gpuh"]),
        (["--budget", "9000usd"], ["--price"]),
        (["--calibrate", "nowhere"], ["nowhere"]),
        (["llama-8b", "--gpus", "8", "--calibration", "nowhere.toml"], ["cannot read"]),
    ],
)
def test_bad_input(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_a_budget_becomes_a_file_that_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.toml"
    command = ["plan", "--budget", "2000usd", "--price", "2", "--gpus", "8", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert out.read_text() in text
    told = planned(capsys, *command[1:], "--overwrite")
    assert told["gpu_hours"]["point"] == pytest.approx(1000, rel=0.01)
    assert told["cost"]["point"] == pytest.approx(2000, rel=0.01)
    assert main(command) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_analytic_path_imports_no_torch() -> None:
    """Or it could not answer within two seconds."""
    code = (
        "import sys; from bigtrain.cli import main\n"
        "main(['plan', 'llama-8b', '--gpus', '64'])\n"
        "main(['plan', '--budget', '100gpuh'])\n"
        "assert not {'torch', 'deepspeed', 'matplotlib', 'numpy'} & set(sys.modules), 'slow imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_own_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        "[gpu.abacus]\nmemory_gib = 500.0\npeak_tflops = {bf16 = 100}\nbandwidth_gb_s = 1000\n"
        "link_gb_s = 100\nper_node = 4\n"
    )
    told = planned(capsys, "llama-8b", "--gpus", "8", "--gpu", "abacus", "--hardware", str(file))
    assert told["capacity"] == 500 * 2**30
    assert told["cluster"]["nodes"] == 2


def test_text_and_json_tell_the_same() -> None:
    config = load(find_config("llama-8b"))
    e = estimate(config, job_of(config, 64), cluster_of("h100", 64), price=3.0)
    text, told = tell(e), to_json(e)
    assert f"{told['cost']['point']:,.0f}" in text
    assert f"{told['tokens_per_second_per_gpu']['point']:,.0f}" in text
    assert f"{100 * told['mfu']['point']:.1f} %" in text
