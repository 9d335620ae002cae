"""A tiny corpus and a tiny model for whole runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bigtrain.data.prepare import PrepareOptions, prepare

TINY = """\
name = "tiny"
[model]
vocab_size = 400
layers = 2
width = 32
heads = 4
kv_heads = 2
max_length = 64
tied = true
[data]
path = "{data}"
sequence_length = 32
[train]
steps = 30
global_batch = 8
microbatch = 2
eval_every = 10
eval_sequences = 8
[optim]
lr = 3e-3
warmup_steps = 3
[checkpoint]
every_steps = 5
keep_last = 3
[log]
tensorboard = false
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Tiny:
    """Starts `bigtrain` on the tiny config, always as a separate process with one thread."""

    config: Path
    data: Path

    def command(self, *arguments: str, processes: int = 1) -> list[str]:
        """The full command line."""
        if processes == 1:
            return [sys.executable, "-m", "bigtrain", *arguments]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, f"--nproc-per-node={processes}", "-m", "bigtrain", *arguments]

    def environment(self) -> dict[str, str]:
        """One thread a process, no leftovers of an outer launcher."""
        drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {k: v for k, v in os.environ.items() if k not in drop}
        return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def __call__(self, *arguments: str, processes: int = 1, timeout: float = 120) -> Result:
        """Run to the end."""
        done = subprocess.run(
            self.command(*arguments, processes=processes),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment(),
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def train(self, run: Path, *settings: str, processes: int = 1, flags: Sequence[str] = ()) -> Result:
        """`bigtrain train` into `run` with `--set` for each setting."""
        sets = [part for setting in settings for part in ("--set", setting)]
        return self("train", str(self.config), "--run-dir", str(run), *sets, *flags, processes=processes)


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The step records of a run by step; each step exactly once."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert len({r["step"] for r in steps}) == len(steps), "a step was recorded twice"
    return {r["step"]: r for r in steps}


def losses_of(run: Path) -> list[float]:
    """The loss of every step, in order."""
    return [record["loss"] for _, record in sorted(steps_of(run).items())]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A corpus of a few library modules and the tiny config on it."""
    folder = tmp_path_factory.mktemp("tiny")
    library = Path(sysconfig.get_path("stdlib"))
    names = ("abc", "bisect", "calendar", "cmd", "code", "contextlib", "copy", "csv", "dis", "heapq", "shlex")
    prepare(
        PrepareOptions(
            inputs=tuple(str(library / f"{name}.py") for name in names),
            out=folder / "data",
            tokenizer_kind="bpe",
            vocab_size=400,
            validation_fraction=0.2,
        )
    )
    config = folder / "tiny.toml"
    config.write_text(TINY.format(data=folder / "data"))
    return Tiny(config, folder / "data")


@pytest.fixture(scope="session")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = tiny.train(run)
    assert done.code == 0, done.err
    assert "are read in parts, none is lost" in done.out, "documents longer than a sequence are announced"
    return run
