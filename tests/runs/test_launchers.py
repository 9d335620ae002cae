"""Runs under SLURM, mpirun and torchrun, by the scripts of launch/: stopped, killed and started again, the same run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path

import pytest

from tests.runs import slurm_cluster
from tests.runs.conftest import Tiny, losses_of, steps_of
from tests.runs.supervised import kill_tree
from tests.runs.worlds import ROOT, rank_pid, with_mpirun

pytestmark = [pytest.mark.runs, pytest.mark.timeout(1500)]

SETTINGS = ("train.steps=100", "train.eval_every=0", "checkpoint.every_steps=10", "layout.zero=0")
SETS = [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two ranks that nobody interrupts."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = tiny.train(run, *SETTINGS, processes=2)
    assert done.code == 0, done.err
    return losses_of(run)


def state_of(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "outcome.json").read_text())) if (run / "outcome.json").exists() else {}


def step_of(run: Path) -> int:
    """The last step that was recorded."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def until(what: str, condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for a condition."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"{what} did not come within {seconds:g} s"
        time.sleep(0.2)


def start(command: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as f:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=f, stderr=f)


def disturb(
    begin: Callable[[], subprocess.Popen[bytes]], run: Path, variable: str, log: Path, ask: signal.Signals
) -> None:
    """A rank dies: the script goes on by itself; a signal asks to stop: it saves; started again: it ends."""
    script = begin()
    until("step 12", lambda: step_of(run) >= 12)
    os.kill(rank_pid(run, variable, 1), signal.SIGKILL)
    until("the restart", lambda: "resumed from step_" in log.read_text())
    before = step_of(run)
    until("a step after the restart", lambda: step_of(run) > before)
    script.send_signal(ask)
    script.wait(timeout=300)
    assert state_of(run)["state"] == "preempted", log.read_text()
    assert state_of(run)["reason"] in ("SIGTERM", ask.name)
    assert begin().wait(timeout=600) == 0, log.read_text()
    assert state_of(run)["state"] == "done"


@pytest.mark.parametrize("ask", [signal.SIGUSR1, signal.SIGTERM])
def test_torchrun(ask: signal.Signals, tiny: Tiny, undisturbed: list[float], tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    env = {**tiny.environment(), "PYTHON": sys.executable, "NPROC": "2", "GRACE": "100"}
    command = ["bash", "launch/torchrun.sh", str(tiny.config), "--run-dir", str(run), *SETS]
    disturb(lambda: start(command, env, log), run, "RANK", log, ask)
    assert losses_of(run) == undisturbed


def test_each_signal_on_any_one_rank(tiny: Tiny, tmp_path: Path) -> None:
    """In training and in evaluation, to one rank alone: both agree, save, and go on later as if nothing had been."""
    sets = [*SETS, "--set", "train.eval_every=20", "--set", "train.eval_sequences=400"]
    command = tiny.command("train", str(tiny.config), "--run-dir", str(tmp_path / "run"), *sets, processes=2)
    run, log = tmp_path / "run", tmp_path / "log"
    asked = ((signal.SIGTERM, 1, 5), (signal.SIGUSR1, 0, 20), (signal.SIGUSR2, 1, 40), (signal.SIGINT, 0, 65))
    for ask, rank, step in asked:
        ranks = start(command, tiny.environment(), log)
        until(f"step {step}", lambda step=step: step_of(run) >= step)  # type: ignore[misc]
        asked_rank = rank_pid(run, "RANK", rank)
        os.kill(asked_rank, ask)
        time.sleep(0.01)
        os.kill(asked_rank, ask)  # as SLURM and torchrun both tell a rank
        ranks.wait(timeout=120)
        assert (state_of(run)["state"], state_of(run)["reason"]) == ("preempted", ask.name), log.read_text()
        assert state_of(run)["step"] == step_of(run) >= step
    assert start(command, tiny.environment(), log).wait(timeout=300) == 0, log.read_text()
    assert losses_of(run) == whole(tiny, sets, 100, tmp_path)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_while_one_rank_waits_for_data(
    asked: int, tiny: Tiny, undisturbed: list[float], tmp_path: Path
) -> None:
    """Rank 1's storage hangs at step 15, and rank 0 waits for it in a collective: whoever is asked, both save."""
    run, log = tmp_path / "run", tmp_path / "log"
    sound = tiny.command("train", str(tiny.config), "--run-dir", str(run), *SETS, processes=2)
    at = sound.index("bigtrain")
    hanging = [*sound[:at], "tests.runs.failing", "data", "1", "15", *sound[at + 1 :]]
    ranks = start(hanging, tiny.environment(), log)
    until("step 14", lambda: step_of(run) == 14)
    time.sleep(2.0)  # both wait now
    os.kill(rank_pid(run, "RANK", asked), signal.SIGTERM)
    assert ranks.wait(timeout=120) == 0, log.read_text()
    state = state_of(run)
    assert (state["state"], state["reason"], state["step"]) == ("preempted", "SIGTERM", 14), log.read_text()
    assert start(sound, tiny.environment(), log).wait(timeout=300) == 0, log.read_text()
    assert losses_of(run) == undisturbed


def test_a_signal_during_a_long_first_step(tiny: Tiny, undisturbed: list[float], tmp_path: Path) -> None:
    """As where kernels are compiled: the step is made, and saved."""
    run, log = tmp_path / "run", tmp_path / "log"
    sound = tiny.command("train", str(tiny.config), "--run-dir", str(run), *SETS, processes=2)
    at = sound.index("bigtrain")
    ranks = start(
        [*sound[:at], "tests.runs.failing", "nap", "1", "1", *sound[at + 1 :]], tiny.environment(), log
    )
    until("the first step", lambda: "training" in log.read_text())
    os.kill(rank_pid(run, "RANK", 0), signal.SIGUSR1)
    assert ranks.wait(timeout=120) == 0, log.read_text()
    assert state_of(run)["state"] == "preempted", log.read_text()
    assert start(sound, tiny.environment(), log).wait(timeout=300) == 0, log.read_text()
    assert losses_of(run) == undisturbed


def test_mpirun(tiny: Tiny, undisturbed: list[float], tmp_path: Path) -> None:
    env = with_mpirun(tiny.environment())
    run, log = tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "bigtrain",
        "launch",
        "mpi",
        str(tiny.config),
        "--run-dir",
        str(run),
        *SETS,
    ]
    command += ["--hosts", "localhost:2", "--grace", "100"]

    printed = subprocess.run(
        [*command, "--print"], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    script = tmp_path / "mpirun.sh"
    script.write_text(printed.stdout)
    disturb(lambda: start(["bash", str(script)], env, log), run, "OMPI_COMM_WORLD_RANK", log, signal.SIGTERM)
    assert losses_of(run) == undisturbed


def test_mpich(tiny: Tiny, undisturbed: list[float], tmp_path: Path) -> None:
    """MPICH's launcher tells ranks their places in other words; it stops when it is asked to, saved."""
    if shutil.which("mpiexec.hydra") is None:
        pytest.skip("mpiexec.hydra is not installed (apt-get install mpich)")
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["mpiexec.hydra", "-n", "2", sys.executable, "-m", "bigtrain", "train", str(tiny.config), *SETS]
    command += ["--run-dir", str(run)]
    launcher = start(command, tiny.environment(), log)
    until("step 12", lambda: step_of(run) >= 12)
    launcher.terminate()
    launcher.wait(timeout=300)
    assert state_of(run)["state"] == "preempted", log.read_text()
    assert start(command, tiny.environment(), log).wait(timeout=600) == 0, log.read_text()
    assert losses_of(run) == undisturbed


def test_torchrun_with_fewer_and_more_hosts(tiny: Tiny, tmp_path: Path) -> None:
    """Two hosts, of which one dies: the other goes on alone, from the newest checkpoint; then another one comes."""
    run = tmp_path / "run"
    sets = [*SETS, "--set", "train.steps=4000", "--set", "layout.threads=1"]
    env = {**tiny.environment(), "PYTHON": sys.executable, "NPROC": "1", "NNODES": "1:2", "RESTARTS": "3"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "BIGTRAIN_HANG_SECONDS": "20"}
    command = ["bash", "launch/torchrun.sh", str(tiny.config), "--run-dir", str(run), *sets]
    hosts = [start(command, env, tmp_path / "host0")]

    def worlds() -> list[int]:
        """How many ranks there were, one after the other."""
        try:
            steps = steps_of(run).values()
        except ValueError:  # the last line is being written
            return []
        rates = [(r["tokens_per_second"], r["tokens_per_second_per_device"]) for r in steps]
        return [world for world, _ in groupby(round(all_ / each) for all_, each in rates)]

    try:
        # Both are one machine here, and would both hold the store where they meet: the first must have it.
        until("the store", lambda: listens(int(env["MASTER_PORT"])))
        hosts.append(start(command, env, tmp_path / "host1"))
        until("step 12", lambda: step_of(run) >= 12)
        kill_tree(hosts[1].pid)
        until("steps of one rank", lambda: worlds() == [2, 1])
        hosts.append(start(command, env, tmp_path / "host2"))
        until("steps of two ranks", lambda: worlds() == [2, 1, 2])
        hosts[0].terminate()
        hosts[2].terminate()
        hosts[0].wait(timeout=300)
    finally:
        for host in hosts:
            kill_tree(host.pid)
    assert state_of(run)["state"] == "preempted", (tmp_path / "host0").read_text()[-3000:]
    found = losses_of(run)
    # The sum over two ranks' microbatches is another order of addition, which training magnifies.
    assert found == pytest.approx(whole(tiny, sets, len(found), tmp_path), rel=1e-3)


def whole(tiny: Tiny, sets: list[str], steps: int, folder: Path) -> list[float]:
    """The first losses of two ranks that nobody interrupts."""
    run = folder / "whole"
    command = tiny.command("train", str(tiny.config), "--run-dir", str(run), *sets, processes=2)
    ranks = start(command, tiny.environment(), folder / "whole.log")
    try:
        until("as many steps", lambda: step_of(run) >= steps)
    finally:
        kill_tree(ranks.pid)
    return losses_of(run)[:steps]


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a SLURM with two nodes."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield env


def jobs(env: Mapping[str, str]) -> dict[str, str]:
    """State by job id, of those that wait or run."""
    told = subprocess.run(
        ["squeue", "-h", "-o", "%i %T"], env=env, capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in told.stdout.splitlines())


@pytest.mark.parametrize("by", ["srun", "torchrun"])
def test_slurm(by: str, slurm: dict[str, str], tiny: Tiny, undisturbed: list[float], tmp_path: Path) -> None:
    """Submitted, a rank killed, preempted by a signal, queued again by its own script, done; then a cancelled one."""
    run = tmp_path / "run"
    env = {**tiny.environment(), "SLURM_CONF": slurm["SLURM_CONF"]}
    command = [sys.executable, "-m", "bigtrain", "launch", "slurm", str(tiny.config), *SETS, "--by", by]
    command += ["--nodes", "2", "--gpus-per-node", "1", "--sbatch", "gpus-per-node=", "--cpus-per-rank", "1"]
    command += ["--grace", "60", "--time", "20", "--run-dir"]

    def submit(run: Path) -> str:
        told = subprocess.run([*command, str(run)], env=env, cwd=ROOT, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        return told.stdout.split()[-1]

    def log(run: Path) -> str:
        return "".join(path.read_text() for path in (run / "launch").glob("slurm-*.out"))

    job = submit(run)
    until("step 12", lambda: step_of(run) >= 12)
    os.kill(rank_pid(run, "RANK" if by == "torchrun" else "SLURM_PROCID", 1), signal.SIGKILL)
    until("the restart", lambda: "resumed from step_" in log(run))
    subprocess.run(["scancel", "--signal=USR1", job], env=env, check=True)
    until("the queue", lambda: jobs(env).get(job) == "PENDING")
    assert state_of(run)["state"] == "preempted", log(run)
    assert state_of(run)["reason"] == "SIGUSR1"
    # SLURM holds a requeued job back for two minutes, and revokes one that begins in the second that it ended in.
    time.sleep(2)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=env, check=False)
    until("the end", lambda: job not in jobs(env), 600)
    assert state_of(run)["state"] == "done", log(run)
    assert losses_of(run) == undisturbed

    if by == "srun":
        job = submit(tmp_path / "cancelled")
        until("step 5", lambda: step_of(tmp_path / "cancelled") >= 5)
        subprocess.run(["scancel", job], env=env, check=True)
        until("the end", lambda: job not in jobs(env))
        assert state_of(tmp_path / "cancelled")["state"] == "preempted", "it saved"


def test_slurms_time_limit(slurm: dict[str, str], tiny: Tiny, tmp_path: Path) -> None:
    """SLURM's own warning before the limit: saved, queued again, gone on with, on the curve of a run without limit."""
    longer = [*SETS, "--set", "train.steps=4000"]
    run = tmp_path / "run"
    env = {**tiny.environment(), "SLURM_CONF": slurm["SLURM_CONF"]}
    command = [sys.executable, "-m", "bigtrain", "launch", "slurm", str(tiny.config), *longer, "--nodes", "2"]
    command += ["--gpus-per-node", "1", "--sbatch", "gpus-per-node=", "--cpus-per-rank", "1", "--grace", "60"]
    told = subprocess.run(
        [*command, "--time", "20", "--run-dir", str(run)], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    job = told.stdout.split()[-1]

    def limit(minutes: int) -> None:
        subprocess.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}"], env=env, check=True)

    until("step 12", lambda: step_of(run) >= 12)
    limit(2)  # SLURM looks at limits twice a minute, and warns 60 to 120 seconds before
    until("the queue", lambda: jobs(env).get(job) == "PENDING")
    log = "".join(path.read_text() for path in (run / "launch").glob("slurm-*.out"))
    assert (state_of(run)["state"], state_of(run)["reason"]) == ("preempted", "SIGUSR1"), log
    before = step_of(run)
    assert before < 4000
    limit(20)
    time.sleep(2)  # as in test_slurm
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=env, check=False)
    until("steps after the limit", lambda: step_of(run) > before + 5)
    subprocess.run(["scancel", job], env=env, check=True)
    until("the end", lambda: job not in jobs(env))
    found = losses_of(run)
    assert whole(tiny, longer, len(found), tmp_path) == found
