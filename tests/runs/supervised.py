"""A run on two hosts, each with a supervisor that starts launch/torchrun.sh again until the run is done; and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tests.runs.hosts import ADDRESSES, Hosts
from tests.runs.worlds import ROOT, rank_pid

PATIENCE = 300.0
"""Seconds for a run to make a step again, whatever the fault."""

POISON = '''\
"""Loaded by these runs: the loss of rank 1 becomes NaN once when the file that POISON_FILE names exists."""
import importlib.abc, importlib.machinery, os, sys

class Poisoner(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bigtrain.engine.reference" or os.environ.get("RANK") != "1":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def poisoned(module):
            execute(module)
            forward = module.ReferenceEngine._forward
            def poison(self, batch):
                out = forward(self, batch)
                if os.path.exists(os.environ["POISON_FILE"]):
                    os.unlink(os.environ["POISON_FILE"])
                    out = out._replace(objective=out.objective * float("nan"))
                return out
            module.ReferenceEngine._forward = poison
        spec.loader.exec_module = poisoned
        return spec

sys.meta_path.insert(0, Poisoner())
'''


class World:
    """Two supervised hosts that train into one run directory."""

    def __init__(
        self,
        hosts: Hosts,
        folder: Path,
        config: Path,
        run: Path,
        settings: Sequence[str],
        hang: float,
    ) -> None:
        """`hang`: BIGTRAIN_HANG_SECONDS. `folder` takes the launchers' logs."""
        self.hosts, self.folder, self.run, self.hang = hosts, folder, run, hang
        self.poison = folder / "poison"
        """Touch it, and the loss of rank 1 becomes NaN once."""
        sets = [part for setting in settings for part in ("--set", setting)]
        self.command = ["bash", "launch/torchrun.sh", str(config), "--run-dir", str(run), *sets]
        (folder / "sitecustomize.py").write_text(POISON)
        self.launchers: dict[int, subprocess.Popen[bytes]] = {}
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._supervise, args=(host,)) for host in (0, 1)]

    def __enter__(self) -> World:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for launcher in self.launchers.values():
            kill_tree(launcher.pid)
        for thread in self._threads:
            thread.join()

    def _supervise(self, host: int) -> None:
        """Start the launcher again and again, until the run is done."""
        env = {
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{self.folder}:{ROOT}:{ROOT / 'kernels'}",
            "POISON_FILE": str(self.poison),
            "BIGTRAIN_HANG_SECONDS": str(self.hang),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "NNODES": "2",
            "NPROC": "1",
            "MASTER_ADDR": ADDRESSES[0],
            "GRACE": "5",
            "RESTARTS": "1000",
        }
        with (self.folder / f"host{host}.log").open("ab") as log:
            while not self._ended.is_set() and self.state() != "done":
                self.launchers[host] = subprocess.Popen(
                    self.hosts.command(host, self.command),
                    env=env,
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                self.launchers[host].wait()
                time.sleep(1)

    def state(self) -> str:
        """How the last attempt ended; "" while one runs."""
        try:
            return str(json.loads((self.run / "outcome.json").read_text())["state"])
        except (OSError, ValueError, KeyError):  # absent, or half written on a full disk
            return ""

    def attempts(self) -> int:
        """How many there were."""
        return len(list((self.run / "logs").glob("[0-9]*")))

    def last(self) -> tuple[int, float]:
        """Number and time of the last recorded step."""
        try:
            lines = (self.run / "metrics.jsonl").read_bytes().splitlines()[-50:]
        except OSError:
            return 0, 0.0
        for line in reversed(lines):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["kind"] == "step":
                return record["step"], record["time"]
        return 0, 0.0

    def ranks(self) -> list[int]:
        """Process ids by rank."""
        return [rank_pid(self.run, "RANK", rank) for rank in (0, 1)]

    def until(self, what: str, condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Wait. AssertionError with the end of the launchers' logs when it takes too long."""
        ends = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > ends:
                logs = [(self.folder / f"host{h}.log").read_text(errors="replace")[-6000:] for h in (0, 1)]
                raise AssertionError(f"{what} did not come within {seconds:g} s\n" + "\n----\n".join(logs))
            time.sleep(0.02)

    def newest_checkpoint(self) -> Path:
        """The last that was committed."""
        return max(path.parent for path in self.run.glob("checkpoints/step_*/manifest.json"))


def kill_tree(pid: int) -> None:
    """SIGKILL to a launcher and all that it started, which have groups of their own."""
    tree, todo = [], [pid]
    while todo:
        tree.append(todo.pop())
        try:
            children = Path(f"/proc/{tree[-1]}/task/{tree[-1]}/children").read_text()
        except OSError:
            continue
        todo += [int(child) for child in children.split()]
    for process in tree:
        kill(process, signal.SIGKILL)


def kill(pid: int, what: signal.Signals) -> None:
    """Unless it is gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, what)
