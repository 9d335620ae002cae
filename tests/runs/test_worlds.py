"""The helper that starts worlds says what went wrong, does not wait for minutes and leaves nothing behind."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.runs.worlds import run_world

pytestmark = pytest.mark.runs

FAIL = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("the second rank has had enough")
print("the first rank waits", flush=True)
time.sleep(60)
"""
SLEEP = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(60)
"""
MEET = """
import os
from bigtrain.mesh import rendezvous
mesh = rendezvous(timeout_minutes=0.5)
print(mesh.gather((os.environ["WORLD_NAME"], mesh.rank)))
mesh.close()
"""


def test_a_failure_shows_the_words_of_all_ranks_soon() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        run_world(["-c", FAIL], 2, timeout=50)
    assert time.monotonic() - started < 20
    said = str(caught.value)
    assert "rank 1 ended with 1\n\nthe second rank has had enough" in said
    assert "rank 0 was stopped\nthe first rank waits" in said


def test_time_is_up_for_children_too(tmp_path: Path) -> None:
    finished = run_world(["-c", SLEEP, str(tmp_path / "pid")], 1, timeout=3, check=False)
    assert [f.code for f in finished] == [None]
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("a child outlived its world")


def test_two_worlds_at_a_time_do_not_meet() -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(run_world, ["-c", MEET], 2, timeout=60, env={"WORLD_NAME": name})
            for name in ("one", "two")
        ]
        for name, run in zip(("one", "two"), runs, strict=True):
            assert [f.stdout.strip() for f in run.result()] == [str([(name, 0), (name, 1)])] * 2
