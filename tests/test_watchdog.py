"""The watchdog of one process: it ends a hang, it never ends a slow run, it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from bigtrain.errors import UserError
from bigtrain.heartbeat import Timer, identity, stat_of
from bigtrain.mesh import Mesh
from bigtrain.place import Place
from bigtrain.watchdog import Watchdog, gather_seconds, hang_seconds

RUN = """
import sys, time
import torch
from bigtrain.mesh import Mesh
from bigtrain.place import Place
from bigtrain.watchdog import Watchdog
dog = Watchdog(seconds=1.0)
dog.watch(Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu")))
dog.pulse.stepped = True
print("watched", flush=True)
for step in range(int(sys.argv[1])):
    dog.pulse.mark("training", step)
    time.sleep(0.1)
if sys.argv[2] == "hang":
    def in_here():
        time.sleep(60)
    in_here()
dog.close()
"""


def started(steps: int, then: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(steps), then],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "watched\n"
    return process


def test_a_hang_of_one_process_ends_it() -> None:
    process = started(3, "hang")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    line = next(line for line in said.splitlines() if "run failed" in line)
    assert line.startswith("[rank 0] bigtrain: run failed: rank 0 hangs: for ")
    assert "in step 2, training: in no collective, but in in_here" in line
    assert "in in_here" in said.split("stacks of all threads")[1]


def test_marks_keep_it_alive_and_so_does_being_suspended() -> None:
    process = started(40, "end")
    time.sleep(1.0)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)  # a suspended job: longer than the limit, by every clock
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said


def test_it_stops_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    dog = Watchdog(seconds=600.0)
    dog.watch(Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu")))
    assert {t.name for t in threading.enumerate()} - {t.name for t in before} == {"bigtrain-watch"}
    dog.leave()
    dog.close()
    assert set(threading.enumerate()) <= before


def test_off_means_off() -> None:
    before = threading.active_count()
    dog = Watchdog(seconds=0.0)
    dog.watch(Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu")))
    assert threading.active_count() == before
    assert dog.ask("lost") == ""


def test_limits_know_the_phase_and_what_was_survived() -> None:
    dog = Watchdog(seconds=100.0)
    assert dog._limit(0.0) == 300, "before the first step: it builds, loads, compiles"
    dog.pulse.stepped = True
    dog.pulse.phase = "training"
    assert dog._limit(0.0) == 100
    assert dog._limit(50.0) == 500, "a run that takes 50 s between marks is slow, not hung"
    dog.pulse.phase = "saving"
    assert dog._limit(0.0) == 300


def test_a_timer_counts_from_the_last_change() -> None:
    timer = Timer()
    assert timer.same_for("a", 10.0) == 0
    assert timer.same_for("a", 12.5) == 2.5
    assert timer.same_for("b", 13.0) == 0


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "1e9", ""])
def test_settings_that_are_no_seconds(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGTRAIN_HANG_SECONDS", value)
    monkeypatch.setenv("BIGTRAIN_STRAGGLER_SECONDS", value)
    with pytest.raises(UserError, match=r"BIGTRAIN_HANG_SECONDS: .* is no number of seconds"):
        hang_seconds()
    with pytest.raises(UserError, match="BIGTRAIN_STRAGGLER_SECONDS"):
        gather_seconds()


def test_settings_and_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIGTRAIN_HANG_SECONDS", raising=False)
    assert hang_seconds() == 600
    monkeypatch.setenv("BIGTRAIN_HANG_SECONDS", "0")
    assert hang_seconds() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_process_is_told_from_a_later_one_of_the_same_number() -> None:
    mine = stat_of(os.getpid())
    assert mine is not None
    assert mine["state"] == "R"
    assert identity()["began"] == mine["began"]
    child = subprocess.Popen(["sleep", "60"])
    child.send_signal(signal.SIGSTOP)
    for _ in range(100):
        stat = stat_of(child.pid)
        if stat and stat["state"] == "T":
            break
        time.sleep(0.02)
    assert stat is not None
    assert stat["state"] == "T"
    child.kill()
    child.wait()
    assert stat_of(child.pid) is None
