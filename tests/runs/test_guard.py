"""Spikes planted in whole runs: each policy does what it says, to the bit, in every layout and after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint.format import MANIFEST
from tests.runs.conftest import Result, Tiny, losses_of, steps_of
from tests.runs.test_train import weights_of
from tests.runs.worlds import run_world

pytestmark = [pytest.mark.runs, pytest.mark.timeout(900)]

SPIKE = 15
"""The step that reads the planted samples."""
RANGE = (8 * (SPIKE - 1), 8 * SPIKE - 1)
BAD = {"bad": RANGE}
SETTINGS = ("guard.window=16", "train.steps=24", "train.eval_every=12", "optim.schedule=constant")


def command(tiny: Tiny, run: Path, *settings: str, processes: int = 1) -> list[str]:
    """`bigtrain train` with what PLANT says."""
    sets = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    words = tiny.command("train", str(tiny.config), "--run-dir", str(run), *sets, processes=processes)
    return ["tests.runs.spiked" if word == "bigtrain" else word for word in words]


def environment(tiny: Tiny, plant: dict[str, Sequence[int]]) -> dict[str, str]:
    return {**tiny.environment(), "PLANT": json.dumps(plant)}


def train(
    tiny: Tiny, run: Path, plant: dict[str, Sequence[int]], *settings: str, processes: int = 1
) -> Result:
    """To the end, which must be a good one."""
    done = subprocess.run(
        command(tiny, run, *settings, processes=processes),
        env=environment(tiny, plant),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def events_of(run: Path) -> list[dict[str, Any]]:
    """What the guard recorded."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "event" and "norm_z" in r["data"]]


def decisions(run: Path) -> list[tuple[Any, ...]]:
    """The same without what differs between layouts in the last digits."""
    return [
        (e["step"], e["name"], *(e["data"][k] for k in ("action", "step", "first_sample", "last_sample")))
        for e in events_of(run)
    ]


def guards_of(run: Path) -> list[list[dict[str, Any]]]:
    """The rollbacks that each checkpoint of a run knows of, oldest checkpoint first."""
    manifests = sorted((run / "checkpoints").glob(f"step_*/{MANIFEST}"))
    return [json.loads(path.read_text())["state"]["guard"]["rolled"] for path in manifests]


@pytest.fixture(scope="module")
def skipped(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that skipped the spike."""
    run = tmp_path_factory.mktemp("skipped") / "run"
    done = train(tiny, run, BAD, "guard.on_spike=skip")
    assert f"step {SPIKE}: spike, loss" in done.out
    assert f"the update is skipped (samples {RANGE[0]} to {RANGE[1]})" in done.out
    return run


@pytest.fixture(scope="module")
def rolled(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that was rolled back for the spike."""
    run = tmp_path_factory.mktemp("rolled") / "run"
    done = train(tiny, run, BAD, "guard.on_spike=rollback")
    assert f"samples {RANGE[0]} to {RANGE[1]} are left out from now on" in done.out
    assert "went back to step_00000010" in done.out
    return run


@pytest.fixture(scope="module")
def without(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, with no guard to speak of, over an order of samples that never held the range."""
    run = tmp_path_factory.mktemp("without") / "run"
    train(tiny, run, {"without": RANGE}, "guard.window=1000")
    return run


def test_warn_keeps_the_curve_of_the_unguarded_run(tiny: Tiny, tmp_path: Path) -> None:
    warned, unguarded = tmp_path / "warned", tmp_path / "unguarded"
    done = train(tiny, warned, BAD)
    assert f"step {SPIKE}: spike, loss" in done.out
    train(tiny, unguarded, BAD, "guard.window=1000")
    assert losses_of(warned) == losses_of(unguarded)
    assert weights_of(warned) == weights_of(unguarded)
    assert decisions(warned) == [(SPIKE, "spike", "warn", SPIKE, *RANGE)]
    assert decisions(unguarded) == []


def test_skip_is_the_run_in_which_that_update_was_never_made(
    tiny: Tiny, tmp_path: Path, skipped: Path
) -> None:
    still = tmp_path / "still"
    train(tiny, still, {**BAD, "still": [SPIKE]}, "guard.window=1000")
    assert losses_of(skipped) == losses_of(still)
    assert weights_of(skipped) == weights_of(still)
    assert steps_of(skipped)[SPIKE]["skipped"]
    assert sum(r["skipped"] for r in steps_of(skipped).values()) == 1
    assert decisions(skipped) == [(SPIKE, "spike", "skip", SPIKE, *RANGE)]
    z = events_of(skipped)[0]["data"]
    assert max(z["loss_z"], z["norm_z"]) > 8


def test_rollback_is_the_run_that_was_never_given_that_data(rolled: Path, without: Path) -> None:
    assert losses_of(rolled) == losses_of(without)
    assert weights_of(rolled) == weights_of(without)
    assert evaluations(rolled) == evaluations(without)
    assert decisions(rolled) == [(10, "rollback", "rollback", SPIKE, *RANGE)]
    assert all(len(known) == 1 for known in guards_of(rolled)), "every checkpoint says what is left out"


@pytest.mark.parametrize(("leave_out", "checkpoint"), [(1, 10), (6, 5)])
def test_a_kill_after_the_rollback_changes_nothing(
    tiny: Tiny, tmp_path: Path, leave_out: int, checkpoint: int
) -> None:
    """Resumed under "warn", nothing could find the spike again: what is left out is known from the checkpoint.

    With six steps left out, the newest checkpoint has seen some of their data and must be gone.
    """
    run, honest = tmp_path / "killed", tmp_path / "honest"
    process = subprocess.Popen(
        command(tiny, run, "guard.on_spike=rollback", f"guard.leave_out={leave_out}"),
        env=environment(tiny, BAD),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_rollback(run, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL, "the run ended before the kill"
    assert max(steps_of(run)) < 24
    train(tiny, run, BAD, "guard.on_spike=warn", f"guard.leave_out={leave_out}")
    gone = (RANGE[1] + 1 - 8 * leave_out, RANGE[1])
    train(tiny, honest, {"without": gone}, "guard.window=1000")
    assert losses_of(run) == losses_of(honest)
    assert weights_of(run) == weights_of(honest)
    assert decisions(run) == [(checkpoint, "rollback", "rollback", SPIKE, *gone)]


def test_a_rollback_to_the_start_and_over_several_steps_resumes_in_another_layout(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Nothing was saved yet but the initial weights; the last four steps are left out, and stay so on two ranks."""
    run, honest = tmp_path / "run", tmp_path / "honest"
    rare = ("checkpoint.every_steps=0", "guard.leave_out=4")
    done = train(tiny, run, BAD, "guard.on_spike=rollback", "train.steps=18", *rare)
    assert "went back to step_00000000" in done.out
    gone = (RANGE[0] - 24, RANGE[1])
    assert decisions(run) == [(0, "rollback", "rollback", SPIKE, *gone)]
    train(tiny, run, BAD, "guard.on_spike=warn", *rare, processes=2)
    train(tiny, honest, {"without": gone}, "guard.window=1000")
    assert losses_of(run)[:18] == losses_of(honest)[:18]
    assert losses_of(run) == pytest.approx(losses_of(honest), rel=1e-5)


def test_a_second_spike_in_place_of_the_first_is_rolled_back_too_and_one_more_stops_the_run(
    tiny: Tiny, tmp_path: Path
) -> None:
    three = {"bad": (RANGE[0], RANGE[1] + 16)}
    two = {"bad": (RANGE[0], RANGE[1] + 8)}
    run = tmp_path / "run"
    limited = ("guard.on_spike=rollback", "guard.max_rollbacks=2")
    train(tiny, run, two, *limited)
    honest = tmp_path / "honest"
    train(tiny, honest, {"without": two["bad"]}, "guard.window=1000")
    assert losses_of(run) == losses_of(honest)
    assert [d[3:] for d in decisions(run)] == [(SPIKE, *RANGE), (SPIKE, RANGE[0] + 8, RANGE[1] + 8)]
    stopped = subprocess.run(
        command(tiny, tmp_path / "stopped", *limited),
        env=environment(tiny, three),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stopped.returncode == 1
    assert (
        f"after 2 rollbacks for spikes (samples {RANGE[0]} to {RANGE[1] + 8} are left out)" in stopped.stderr
    )
    assert "guard.max_rollbacks" in stopped.stderr


@pytest.mark.parametrize(
    "layout",
    [
        ("layout.zero=0",),
        ("layout.zero=1",),
        ("layout.zero=2",),
        ("layout.zero=3",),
        ("layout.tensor=2",),
        ("layout.pipeline=2",),
    ],
    ids=" ".join,
)
def test_two_ranks_decide_as_one_does_and_roll_back(
    tiny: Tiny, tmp_path: Path, rolled: Path, layout: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    train(tiny, run, BAD, "guard.on_spike=rollback", *layout, processes=2)
    assert decisions(run) == decisions(rolled)
    assert losses_of(run) == pytest.approx(losses_of(rolled), rel=1e-5)


@pytest.mark.parametrize("layout", ["layout.zero=2", "layout.tensor=2"])
def test_two_ranks_decide_as_one_does_and_skip(
    tiny: Tiny, tmp_path: Path, skipped: Path, layout: str
) -> None:
    run = tmp_path / "run"
    train(tiny, run, BAD, "guard.on_spike=skip", layout, processes=2)
    assert decisions(run) == decisions(skipped)
    assert losses_of(run) == pytest.approx(losses_of(skipped), rel=1e-5)


def test_a_nan_on_one_rank_alone_skips_the_update_on_both(tiny: Tiny, tmp_path: Path) -> None:
    """One sample's forward pass goes wrong, which one rank of two reads; the run goes on as one process does."""
    one, two = tmp_path / "one", tmp_path / "two"
    plant = {"nan": (RANGE[1], RANGE[1])}
    train(tiny, one, plant)
    done = train(tiny, two, plant, processes=2)
    assert f"step {SPIKE}: the loss or gradient was not finite; the update is skipped" in done.out
    for run in (one, two):
        assert [s for s, r in steps_of(run).items() if r["skipped"]] == [SPIKE]
        assert decisions(run) == [(SPIKE, "not finite", "skip", SPIKE, *RANGE)]
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)


CASES: list[dict[str, Any]] = [
    *({"layout": {"engine": "zero", "zero": z}} for z in range(4)),
    {"layout": {"engine": "zero", "zero": 2, "offload": "optimizer"}},
    *({"layout": {"engine": "zero", "zero": z}, "precision": "bf16"} for z in range(4)),
    *({"layout": {"engine": "zero", "zero": z}, "precision": "fp16"} for z in range(4)),
]


@pytest.fixture(scope="module")
def refused() -> list[dict[str, Any]]:
    """What became of a refused step in every case, all in one world: start-up costs more than a case."""
    ranks = run_world(["-m", "tests.runs.refuse_worker", json.dumps(CASES)], 2, timeout=240)
    lines = [line for line in ranks[0].stdout.splitlines() if line.startswith("found ")]
    return [json.loads(line.removeprefix("found ")) for line in lines]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_refused_step_changes_nothing_in_any_engine(refused: list[dict[str, Any]], number: int) -> None:
    found = refused[number]
    assert found["skipped"] == [True, True]
    assert found["asked"][0] == found["asked"][1], "the ranks see the same numbers, to the bit"
    assert [len(asked) for asked in found["asked"]] == [1, 1]
    assert found["told"] == [asked[0] for asked in found["asked"]]
    assert found["unchanged"]
    assert found["updates"] == 5
    assert found["same"], "the steps after it are those of a run that never made it"
    if found["scaler"]:
        assert found["scaler"]["scale"] == 2.0**16, "a spike is no overflow"
        assert found["scaler"]["last_overflow"] == -1


def evaluations(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every held-out evaluation."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "eval"]


def wait_for_rollback(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the rollback and the first step after it are recorded."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if (
            metrics.exists()
            and b'"step"' in metrics.read_bytes().partition(b'"rollback"')[2].partition(b"\n")[2]
        ):
            return
        time.sleep(0.002)
    raise AssertionError(f"no rollback: {process.communicate(timeout=5)[1]}")
