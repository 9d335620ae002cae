"""What a process says of where it is."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

from bigtrain.data.prefetch import Prefetch
from bigtrain.whereabouts import pending_collective, whereabouts, write_stacks


def seen_while(wait: Any) -> list[Any]:
    """What another thread sees of this one, the main one, while it waits."""
    seen: list[Any] = []

    def look() -> None:
        time.sleep(0.2)
        seen.append(whereabouts())

    thread = threading.Thread(target=look)
    thread.start()
    wait(thread)
    thread.join()
    return seen


def test_a_sleep_outside_of_bigtrain() -> None:
    (here,) = seen_while(lambda thread: time.sleep(0.6))
    assert re.search(r"tests/test_whereabouts.py:\d+", here.where), here
    assert not here.waits
    assert here.collective == ""


def test_a_wait_for_data_names_our_line_and_the_innermost() -> None:
    done = threading.Event()

    def items() -> Any:
        done.wait(5)
        yield 1

    def wait(thread: threading.Thread) -> None:
        threading.Timer(0.6, done.set).start()
        reading = Prefetch(items(), 1)
        next(reading)
        reading.close()

    (here,) = seen_while(wait)
    assert re.fullmatch(
        r"get, called by __next__ at bigtrain/data/prefetch.py:\d+(, now at .*:\d+)?", here.where
    ), here
    assert not here.waits


def entry(number: int, **changed: Any) -> dict[str, Any]:
    """A record of torch's flight recorder, as of torch 2.13."""
    return {
        "pg_id": 0,
        "process_group": ["0", "default_pg"],
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": "gloo:all_reduce",
        "input_sizes": [[4]],
        "state": "scheduled",
        "retired": False,
        **changed,
    }


def test_the_oldest_collective_that_has_not_ended() -> None:
    status = {"0": {"last_completed_collective": "1"}}
    entries = [entry(1, retired=True), entry(2), entry(3)]
    recorded = {"pg_status": status, "entries": entries}
    assert pending_collective(recorded) == "all_reduce number 2 of default_pg, [4]"
    assert pending_collective({"pg_status": status, "entries": entries[:1]}) == ""
    assert pending_collective({}) == ""


def test_nccl_says_what_the_gpu_has_begun() -> None:
    entries = [
        entry(1, state="completed", profiling_name="nccl:all_reduce"),
        entry(2, state="started", profiling_name="nccl:all_gather", process_group=["1", "undefined"]),
    ]
    assert pending_collective({"pg_status": {}, "entries": entries}) == "all_gather number 2, [4] (started)"
    sent = entry(0, is_p2p=True, p2p_seq_id=5, profiling_name="nccl:send 0->1", state="started")
    assert pending_collective({"pg_status": {}, "entries": [sent]}).startswith(
        "send 0->1 message 5 of default_pg"
    )


def test_stacks_of_all_threads(tmp_path: Path) -> None:
    stop = threading.Event()

    def other_thread() -> None:
        stop.wait(10)

    thread = threading.Thread(target=other_thread)
    thread.start()
    with (tmp_path / "log").open("w") as file:
        write_stacks(file, "a test")
    stop.set()
    thread.join()
    text = (tmp_path / "log").read_text()
    assert "a test: the stacks of all threads" in text
    assert "in other_thread" in text
    assert "in test_stacks_of_all_threads" in text
