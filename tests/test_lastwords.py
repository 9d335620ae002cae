"""A rank that fails leaves word, and the others name it: with stores that are there, frozen or gone, and in worlds."""

from __future__ import annotations

import json
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from bigtrain import lastwords
from bigtrain.errors import UserError
from bigtrain.lastwords import last_words, leave_word, lost_connection
from tests.runs.worlds import run_world


def test_a_frozen_store_is_left_in_time() -> None:
    class Frozen(dist.HashStore):  # type: ignore[misc, name-defined]
        def check(self, keys: list[str]) -> bool:
            time.sleep(60)
            return False

    begin = time.monotonic()
    assert last_words(Frozen()) == ""
    assert time.monotonic() - begin < 2


def test_the_first_word_counts() -> None:
    store = dist.PrefixStore("run", dist.HashStore())
    assert last_words(store) == ""
    leave_word(store, 3, "loss is nan")
    leave_word(store, 1, "lost rank 3")
    assert last_words(store) == "rank 3: loss is nan"


def test_a_store_that_is_gone(capfd: pytest.CaptureFixture[str]) -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    store = dist.PrefixStore(
        "run",
        dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=5), wait_for_workers=False),
    )
    del server
    begin = time.monotonic()
    leave_word(store, 1, "too late")
    assert last_words(store) == ""
    error = lost_connection(RuntimeError("Connection closed by peer"), store, 1)
    assert "rank 0 with the store is gone" in str(error)
    assert time.monotonic() - begin < 2
    assert capfd.readouterr().err == ""


GLOO = "[/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.3]:28873: Connection reset by peer. This is typically"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError(GLOO),
            "another rank ended without a word (Read error [10.0.0.3]:28873: Connection reset by peer)",
        ),
        (
            RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
            "another rank does not answer",
        ),
        (dist.DistBackendError("NCCL error in: x.cpp:1\nncclRemoteError: the peer"), "ended without a word"),
        (dist.DistNetworkError("Failed to recv, got 0 bytes"), "ended without a word"),
        (dist.DistStoreError("wait timeout after 1000ms, keys: /a"), "another rank does not answer"),
        (dist.DistBackendError("NCCL error\nncclUnhandledCudaError: Call to CUDA failed"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ConnectionResetError("Connection reset by peer"), None),  # of a file or a site, not of torch
        (UserError("Connection reset by peer"), None),
    ],
)
def test_errors_of_a_peer_are_told_from_our_own(
    error: Exception, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lastwords, "_word", lambda store: "")
    found = lost_connection(error, dist.HashStore(), 1)
    assert found is None if says is None else says in str(found)


WORKER = """
import os, signal, sys, time, json
from datetime import timedelta
import torch, torch.distributed as dist
from bigtrain.place import discover, fill_environment
from bigtrain.lastwords import leave_word, lost_connection
from bigtrain.rollcall import roll_call
place = discover()
fill_environment(place)
store = roll_call(place, {"code": "same"}, timedelta(seconds=30))
dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world, timeout=timedelta(seconds=30))
dist.all_reduce(torch.ones(1))
if place.rank == 1:
    if sys.argv[1] == "word":
        leave_word(store, 1, "loss is nan at step 7")
    os.kill(os.getpid(), signal.SIGKILL)
begin = time.monotonic()
try:
    while True:
        dist.all_reduce(torch.ones(1000))
except RuntimeError as e:
    error = lost_connection(e, store, place.rank)
print(json.dumps({"error": str(error), "seconds": time.monotonic() - begin}), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("killed", "another rank ended without a word"),
        ("word", "stopped because of rank 1: loss is nan at step 7"),
    ],
)
def test_a_rank_that_dies_in_a_collective(how: str, says: str) -> None:
    finished = run_world(["-c", WORKER, how], 3, timeout=40, check=False)
    assert [f.code for f in finished] == [0, -9, 0], finished
    for f in (finished[0], finished[2]):
        found = json.loads(f.stdout)
        assert says in found["error"]
        assert found["seconds"] < 3
        assert f.stderr == ""
