"""Start a world of processes on this machine, as a launcher would, and say everything when one fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

import pytest
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def with_mpirun(env: Mapping[str, str]) -> dict[str, str]:
    """The environment with the wheel's mpirun, which as root wants to be told twice; skips the test without one."""
    path = f"{Path(sys.executable).parent}:{env['PATH']}"
    if shutil.which("mpirun", path=path) is None:
        pytest.skip('mpirun is not installed (pip install "bigtrain[mpi]")')
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**env, "PATH": path, **allowed}


@dataclass(frozen=True)
class Finished:
    """What became of one rank."""

    rank: int
    code: int | None
    """Exit code, minus the signal's number, or None when it was stopped because of the others or of time."""
    stdout: str
    stderr: str


def run_world(
    arguments: Sequence[str],
    world: int,
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = True,
    grace: float = 2.0,
) -> list[Finished]:
    """Run `python *arguments` in `world` processes with torchrun's variables; their outcome in rank order.

    When a rank fails, the others get `grace` seconds before they are stopped: gloo would let them wait for
    minutes. Each process has one thread. check: AssertionError with the output of all ranks unless all end
    with 0 within `timeout` seconds.

    The rendezvous store is held by this process on a port the kernel chose, as torchrun's agent does, so two
    worlds at a time can never meet on one port.
    """
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)
    common = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES} | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo worlds, on a machine with GPUs too
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }
    with tempfile.TemporaryDirectory(prefix="world") as folder:
        outputs = [
            (open_output(folder, rank, "out"), open_output(folder, rank, "err")) for rank in range(world)
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})},
                cwd=cwd,
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # its children are stopped with it
            )
            for rank, (out, err) in enumerate(outputs)
        ]
        try:
            wait_for_all(processes, timeout, grace)
        finally:
            stopped = [stop(p) for p in processes]
        finished = [
            Finished(rank, None if stopped[rank] else processes[rank].returncode, read(out), read(err))
            for rank, (out, err) in enumerate(outputs)
        ]
    if check and any(f.code != 0 for f in finished):
        raise AssertionError(describe(arguments, finished, timeout))
    return finished


def open_output(folder: str, rank: int, name: str) -> IO[str]:
    """A file, not a pipe: a pipe that nobody empties stops the process that fills it."""
    return open(Path(folder) / f"{rank}.{name}", "w+", encoding="utf-8", errors="replace")


def read(output: IO[str]) -> str:
    """Everything written, and close."""
    with output:
        output.seek(0)
        return output.read()


def wait_for_all(processes: Sequence[subprocess.Popen[bytes]], timeout: float, grace: float) -> None:
    """Until all have ended, or `grace` seconds after the first failure, or until time is up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [p.poll() for p in processes]
        if all(code is not None for code in codes):
            return
        if any(code not in (None, 0) for code in codes):
            deadline, grace = min(deadline, time.monotonic() + grace), float("inf")
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes]) -> bool:
    """Kill a process that still runs, with its children. Whether it did."""
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def describe(arguments: Sequence[str], finished: Sequence[Finished], timeout: float) -> str:
    """All ranks' last words."""
    lines = [f"python {' '.join(arguments)} in {len(finished)} processes (limit {timeout:.0f} s)"]
    for f in finished:
        fate = "was stopped" if f.code is None else f"ended with {f.code}"
        lines.append(f"--- rank {f.rank} {fate}\n{f.stdout[-3000:]}\n{f.stderr[-6000:]}")
    return "\n".join(lines)


def rank_pid(run: Path, variable: str, rank: int) -> int:
    """The process of a rank that trains into `run`, by the variable of its launcher. LookupError if none does."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                env = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(run).encode() in words and b"train" in words and f"{variable}={rank}".encode() in env:
                return int(entry.name)
    raise LookupError(f"no process has {variable}={rank} and trains into {run}")
