"""A rank dies, hangs, is stopped or cut off: the others say which, where and in what, and end; slow runs go on."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.runs import worlds
from tests.runs.conftest import Tiny, losses_of
from tests.runs.worlds import Finished, run_world

pytestmark = [pytest.mark.runs, pytest.mark.timeout(400)]

HOST = re.escape(socket.gethostname())
LIMIT = "20"
"""Seconds without progress that the tests allow; a heartbeat every third of one, missed after 4."""


def train(
    tiny: Tiny,
    run: Path,
    fault: str,
    *settings: str,
    rank: int = 1,
    step: int = 8,
    env: Mapping[str, str] = {},
) -> tuple[list[Finished], float]:
    """Two ranks with a fault on one; how they ended, and the seconds since the last step was recorded."""
    sets = [part for setting in ("layout.zero=0", *settings) for part in ("--set", setting)]
    command = ["-m", "tests.runs.failing", fault, str(rank), str(step)]
    command += ["train", str(tiny.config), "--run-dir", str(run), *sets]
    env = {"BIGTRAIN_HANG_SECONDS": LIMIT, **env}
    finished = run_world(command, 2, timeout=200, env=env, check=False, grace=60)
    assert (run / "metrics.jsonl").exists(), worlds.describe(command, finished, 200)
    return finished, time.time() - (run / "metrics.jsonl").stat().st_mtime


def stacks_of(run: Path, rank: int) -> str:
    return (run / "logs" / "0001" / f"rank_{rank}.log").read_text()


def one_line(finished: Finished) -> str:
    """What a rank said about its end: one message, and no traceback."""
    assert "Traceback" not in finished.stderr, finished.stderr
    said = [line for line in finished.stderr.splitlines() if "run failed: " in line]
    assert len(said) == 1, finished.stderr
    return said[0]


def test_a_killed_rank_is_named_at_once(tiny: Tiny, tmp_path: Path) -> None:
    (alive, dead), seconds = train(tiny, tmp_path / "run", "kill")
    assert (alive.code, dead.code) == (1, -9)
    said = one_line(alive)
    assert re.search(
        rf"rank 1 on {HOST} does not answer \(its process is gone.* last heard of in step \d", said
    )
    assert said.endswith("; the others stand in step 8")
    assert seconds < 20
    assert "stacks of all threads" in stacks_of(tmp_path / "run", 0)
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["state"] == "failed"


def test_a_stopped_rank_is_named_and_killed(tiny: Tiny, tmp_path: Path) -> None:
    (alive, stopped), seconds = train(tiny, tmp_path / "run", "stop")
    assert alive.code == 1
    assert stopped.code == -9, "a launcher would wait for it for ever"
    said = one_line(alive)
    assert re.search(
        rf"rank 1 on {HOST} does not answer \(its process is stopped.* last heard of in step \d", said
    )
    assert said.endswith("; the others stand in step 8")
    assert seconds < 40
    stacks = stacks_of(tmp_path / "run", 0)
    assert "stacks of all threads" in stacks
    assert "trainer.py" in stacks
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["state"] == "failed"
    assert "rank 1" in outcome["reason"]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("kill", -9, "rank 0 with the store is gone"),
        ("stop", -9, rf"rank 0 on {HOST}, which holds the store, does not answer \(its process is stopped"),
    ],
)
def test_the_rank_that_holds_the_store(fault: str, code: int, said: str, tiny: Tiny, tmp_path: Path) -> None:
    """Under srun and mpirun rank 0 holds it: no word, no verdict, and every request to it an error."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {"TORCHELASTIC_USE_AGENT_STORE": "", "MASTER_PORT": str(port)}
    (dead, alive), seconds = train(tiny, tmp_path / "run", fault, rank=0, env=env)
    assert (dead.code, alive.code) == (code, 1)
    assert re.search(said, one_line(alive))
    assert len(alive.stderr.splitlines()) <= 3, "no C++ stacks: " + alive.stderr
    assert seconds < 40


@pytest.mark.parametrize("fault", ["sleep", "lock"])
def test_a_deadlock_is_found_by_the_one_that_does_not_wait_for_others(
    fault: str, tiny: Tiny, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    finished, seconds = train(tiny, run, fault)
    assert [f.code for f in finished] == [1, 1]
    for f in finished:
        said = one_line(f)
        assert re.search(
            rf"rank 1 does not get on: rank 1 on {HOST} for \d+ s in step 8, training: in no collective", said
        )
        assert re.search(r"now at tests/runs/failing.py:\d+$", said), "the line that hangs"
    assert seconds < 60
    waits = re.search(
        r"ERROR bigtrain.watchdog: .*; this rank for \d+ s in step 8, training: in (\w+)", stacks_of(run, 0)
    )
    assert waits is not None
    assert waits[1] == "allreduce" or waits[1] == "all_reduce", "what the healthy rank waits in"
    assert "in happen" in stacks_of(run, 1)
    recorded = json.loads((run / "logs" / "0001" / "flight_0.json").read_text())
    assert recorded["entries"][-1]["profiling_name"] == "gloo:all_reduce"
    assert f"the last collectives: {run}/logs/0001/flight_0.json" in finished[0].stderr


def test_a_slow_run_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    """6 s without a heartbeat's worth of progress, thrice the patience for silence: nobody minds."""
    finished, _ = train(tiny, tmp_path / "run", "nap", env={"BIGTRAIN_HANG_SECONDS": "10"})
    assert [f.code for f in finished] == [0, 0], finished[0].stderr + finished[1].stderr
    assert len(losses_of(tmp_path / "run")) == 30


def test_a_slow_rank_is_named_and_the_run_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    env = {"BIGTRAIN_STRAGGLER_SECONDS": "0.5"}
    finished, _ = train(tiny, run, "slow", "train.steps=120", "train.eval_every=0", step=1, env=env)
    assert [f.code for f in finished] == [0, 0], finished[0].stderr
    said = re.findall(
        rf"rank 1 on {HOST} is slow: its own work in a step takes ([\d.]+) x", finished[0].stdout
    )
    assert len(said) == 1, "once: " + finished[0].stdout
    assert float(said[0]) > 1.2
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [r for r in records if r["kind"] == "event"]
    assert [e["name"] for e in events] == ["straggler"]
    assert events[0]["data"]["ranks"] == [1]
    assert len(losses_of(run)) == 120, "records of another kind are in nobody's way"


class Link:
    """A link to the store that can be cut: nothing comes through, nothing is refused."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._server.accept()
            except OSError:
                return
            theirs = socket.create_connection(("127.0.0.1", self._target))
            for a, b in ((ours, theirs), (theirs, ours)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                while self.cut.is_set():
                    time.sleep(0.1)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        self.cut.clear()
        self._server.close()


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A link that all ranks of the next world reach their store through."""
    links: list[Link] = []
    honest = worlds.TCPStore

    class Behind:
        """The store, at the port of a link."""

        def __init__(self, *arguments: object, **named: object) -> None:
            self._store = honest(*arguments, **named)  # type: ignore[arg-type]
            links.append(Link(self._store.port))
            self.port = links[0].port

    monkeypatch.setattr(worlds, "TCPStore", Behind)

    class Later:
        def __getattr__(self, name: str) -> object:
            return getattr(links[0], name)

    yield Later()  # type: ignore[misc]
    links[0].close()


def test_a_cut_link_ends_the_run(tiny: Tiny, tmp_path: Path, link: Link) -> None:
    run = tmp_path / "run"

    def cut() -> None:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"step"') < 5:
            time.sleep(0.1)
        link.cut.set()

    threading.Thread(target=cut, daemon=True).start()
    finished, _ = train(
        tiny, run, "slow", "train.steps=2000", "train.eval_every=0", "checkpoint.every_steps=0", step=1
    )
    assert [f.code for f in finished] == [1, 1] or {f.code for f in finished} == {1}
    said = [f.stderr for f in finished if "is cut off: torchrun's agent" in f.stderr]
    assert said, finished[0].stderr + finished[1].stderr
    assert re.search(
        rf"rank \d on {HOST} is cut off: .* has not answered for \d+ s; this rank .* in step \d+", said[0]
    )
