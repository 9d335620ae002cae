"""The run directory: created, taken up again, refused, locked, moved aside."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint.store import save
from bigtrain.config import Config
from bigtrain.configfile import build, load
from bigtrain.errors import UserError
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh, rendezvous
from bigtrain.place import Place
from bigtrain.provenance import git_state, redacted
from bigtrain.rundir import RunDir
from tests.runs.worlds import run_world

ONE = Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)


def config(*overrides: str) -> Config:
    base = {
        "name": "test",
        "model": {"vocab_size": 100, "layers": 2, "width": 32, "heads": 4},
        "data": {"path": "data/x", "sequence_length": 16},
        "train": {"steps": 10, "global_batch": 4},
    }
    return build(base, overrides)


def train_a_little(run: RunDir, step: int = 3) -> None:
    """Metrics of some steps and a checkpoint."""
    lines = [json.dumps({"kind": "step", "step": s, "loss": 1.0}) + "\n" for s in range(1, step + 3)]
    run.metrics.write_text("".join(lines))
    save(run.checkpoints, step, [Piece("master", "w", (2,), (0,), torch.ones(2))], {"step": step}, ONE)


def test_a_new_run_holds_config_and_provenance(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path / "runs" / "a", config(), data="hash1")
    assert load(run.path / "config.toml") == config()
    written = json.loads((run.path / "provenance.json").read_text())
    assert written["data"] == "hash1"
    (attempt,) = written["attempts"]
    assert attempt["pid"] == os.getpid()
    assert attempt["versions"]["torch"] == torch.__version__
    assert attempt["hardware"]["cores"] >= 1
    assert attempt["hosts"] == [attempt["host"]]
    assert (run.attempt, run.notes) == (1, [])
    assert run.checkpoints.is_dir()
    run.finish("done", 10, "all steps made")
    outcome = json.loads((run.path / "outcome.json").read_text())
    assert (outcome["state"], outcome["step"], outcome["reason"]) == ("done", 10, "all steps made")
    run.close()


def test_the_same_command_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, config())
    train_a_little(run, step=3)
    run.finish("preempted", 3)
    run.close()
    run = RunDir.open(tmp_path, config())
    assert (run.attempt, run.notes) == (2, [])
    assert not (tmp_path / "outcome.json").exists(), "absent while running"
    run.begin(3)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]
    assert len(json.loads((tmp_path / "provenance.json").read_text())["attempts"]) == 2
    run.close()


def test_changes_that_keep_the_run_are_allowed_and_told(tmp_path: Path) -> None:
    run = RunDir.open(tmp_path, config())
    train_a_little(run)
    run.close()
    now = config("train.steps=20", "layout.zero=2", "checkpoint.keep_last=9", "optim.lr=1e-3")
    run = RunDir.open(tmp_path, now)
    assert sorted(run.notes) == [
        "changed since the last attempt: checkpoint.keep_last: 3 in the run, 9 now",
        "changed since the last attempt: layout.zero: 1 in the run, 2 now",
        "changed since the last attempt: optim.lr: none in the run, 0.001 now",
        "changed since the last attempt: train.steps: 10 in the run, 20 now",
    ]
    assert load(tmp_path / "config.toml") == now
    assert "train.steps: 10 in the run, 20 now" in (tmp_path / "provenance.json").read_text()
    run.close()


@pytest.mark.parametrize(
    ("overrides", "data", "line"),
    [
        (["model.width=64"], "h1", "model.width: 32 in the run, 64 now"),
        (["model.kv_heads=2"], "h1", "model.kv_heads: none in the run, 2 now"),
        (["train.seed=9"], "h1", "train.seed: 1 in the run, 9 now"),
        (["data.sequence_length=8"], "h1", "data.sequence_length: 16 in the run, 8 now"),
        (["optim.kind=sgd", "optim.lr=1.0"], "h1", 'optim.kind: "adamw" in the run, "sgd" now'),
        ([], "h2", 'data (content): "h1" in the run, "h2" now'),
    ],
)
def test_another_run_is_refused_key_by_key(
    tmp_path: Path, overrides: list[str], data: str, line: str
) -> None:
    run = RunDir.open(tmp_path, config(), data="h1")
    train_a_little(run)
    run.finish("done", 3)
    run.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError) as caught:
        RunDir.open(tmp_path, config(*overrides), data=data)
    assert line in str(caught.value)
    assert "--fresh" in str(caught.value)
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert after == before
    RunDir.open(tmp_path, config(), data="h1").close()  # the refusal left no lock behind


def test_a_run_without_a_checkpoint_may_still_change_its_model(tmp_path: Path) -> None:
    RunDir.open(tmp_path, config()).close()
    run = RunDir.open(tmp_path, config("model.width=64"))
    assert run.notes == ["changed since the last attempt: model.width: 32 in the run, 64 now"]
    run.close()


def test_fresh_moves_the_former_run_aside(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for n in range(3):
        run = RunDir.open(path, config(f"model.layers={n + 1}"), fresh=True)
        assert run.notes == ([] if n == 0 else [f"the former run was moved to {path}.old-{n}"])
        assert run.attempt == 1
        train_a_little(run)
        run.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]
    assert load(tmp_path / "run.old-2" / "config.toml").model.layers == 2


HOLDER = """
import sys, time
from tests.test_rundir import RunDir, config
run = RunDir.open(sys.argv[1], config())
print("open", flush=True)
time.sleep(60)
"""


def test_two_processes_cannot_train_in_one_run(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    for fresh in (False, True):
        with pytest.raises(
            UserError, match=f"process {holder.pid} on .*, started .* is training in this run"
        ):
            RunDir.open(tmp_path, config(), fresh=fresh)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    RunDir.open(tmp_path, config()).close()  # however violent its end


def test_each_attempt_logs_into_a_file_of_its_own(tmp_path: Path) -> None:
    for attempt in ("0001", "0002"):
        run = RunDir.open(tmp_path, config())
        logging.getLogger("some.library").warning("hello from %s", attempt)
        warnings.warn("mind the gap", stacklevel=1)
        run.close()
        logging.getLogger("some.library").warning("after the end")
        text = (tmp_path / "logs" / attempt / "rank_0.log").read_text()
        assert f"WARNING some.library: hello from {attempt}" in text
        assert "mind the gap" in text
        assert "after the end" not in text


def two_ranks(folder: str) -> None:
    """Both ranks open, log and are refused together."""
    mesh = rendezvous()
    run = RunDir.open(f"{folder}/run", config(), mesh=mesh)
    assert run.attempt == 1
    logging.getLogger("x").warning("I am %d", mesh.rank)
    run.metrics.parent.joinpath("checkpoints", "step_00000001").mkdir(exist_ok=True)
    mesh.barrier()
    run.close()
    mesh.barrier()
    with pytest.raises(UserError, match=r"model\.width: 32 in the run, 64 now"):
        RunDir.open(f"{folder}/run", config("model.width=64"), mesh=mesh)
    run = RunDir.open(f"{folder}/run", config("model.width=64"), mesh=mesh, fresh=True)
    assert (run.attempt, len(run.notes)) == (1, 1)
    mesh.barrier()
    run.close()
    mesh.close()


def test_a_full_disk_is_named_and_keeps_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunDir.open(path, config(), data="hash1").close()
    kept = ("config.toml", "provenance.json")
    before = [(path / name).read_bytes() for name in kept]
    program = (
        "import resource, signal; from pathlib import Path\n"
        "from tests.test_rundir import RunDir, config\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"RunDir.open(Path({str(path)!r}), config(), data='hash1')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert f"RunError: {path}: cannot be written: File too large" in done.stderr, done.stderr
    assert "free some space" in done.stderr
    assert [(path / name).read_bytes() for name in kept] == before


def test_two_runs_cannot_share_a_folder_of_checkpoints(tmp_path: Path) -> None:
    shared = config(f"checkpoint.folder={tmp_path / 'kept'}")
    first = RunDir.open(tmp_path / "a", shared)
    with pytest.raises(
        UserError, match=r"is training in this folder of checkpoints\n.*another checkpoint.folder"
    ):
        RunDir.open(tmp_path / "b", shared)
    first.close()
    RunDir.open(tmp_path / "b", shared).close()


def test_two_ranks_share_a_run_directory(tmp_path: Path) -> None:
    program = "import sys; from tests.test_rundir import two_ranks; two_ranks(sys.argv[1])"
    run_world(["-c", program, str(tmp_path)], 2)
    for rank in (0, 1):
        log = tmp_path / "run.old-1" / "logs" / "0001" / f"rank_{rank}.log"
        assert f"I am {rank}" in log.read_text()
    (attempt,) = json.loads((tmp_path / "run" / "provenance.json").read_text())["attempts"]
    assert (attempt["world"], attempt["launcher"]) == (2, "torchrun")


def test_a_broken_provenance_is_named(tmp_path: Path) -> None:
    RunDir.open(tmp_path, config()).close()
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(UserError, match=r"provenance\.json: is not valid JSON"):
        RunDir.open(tmp_path, config())


def test_no_secret_is_written() -> None:
    shown = redacted(
        "bigtrain train x --set train.tokens=100 --tokenizer t.model WANDB_API_KEY=abc123 "
        "--password hunter2 --hf_token='x y' s3://user:pw@host/path"
    )
    assert "train.tokens=100" in shown
    assert "--tokenizer t.model" in shown
    for secret in ("abc123", "hunter2", "x y", "pw@"):
        assert secret not in shown


def test_git_state_tells_commit_and_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    (tmp_path / "f").write_text("1")
    git("add", "f")
    git("commit", "-qm", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "f").write_text("2")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
