"""Who came, what differs, and what a rank that fails leaves for the others: in threads, and in worlds of processes."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bigtrain import rollcall
from bigtrain.errors import BigtrainError, RunError, UserError
from bigtrain.place import Place
from bigtrain.rollcall import code_digest, difference, excuse, roll_call

pytestmark = pytest.mark.timeout(60)

CONFIG = '# Resolved.\nname = "a"\n\n[optim]\n# the peak\nlr = 0.001\nkind = "adamw"\n\n[train]\nsteps = 10\n'
FACTS = {"config": CONFIG, "code": "ab" * 32, "torch": "2.13.0"}


def a_place(rank: int, world: int) -> Place:
    return Place(rank, world, rank, world, "torchrun")


@pytest.fixture(params=["agent", "rank 0"])
def store_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Environment of a world whose store is held by torchrun's agent, or by rank 0."""
    agent = None
    if request.param == "agent":
        agent = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent.port if agent else free_port()))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(agent is not None))
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setattr(rollcall, "_LINGER", 1.0)
    return agent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def wait_until_free(port: int) -> None:
    ends = time.monotonic() + 20
    while True:
        gc.collect()
        try:
            socket.create_server(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < ends, "the store of the attempt before is still there"
            time.sleep(0.05)


def meet(
    ranks: Mapping[int, Mapping[str, str] | BigtrainError], world: int, seconds: float
) -> dict[int, dist.Store | BigtrainError]:
    """The roll call of these ranks, each in a thread: its store or its error. An error instead of facts: its excuse."""

    def one(rank: int) -> dist.Store | BigtrainError:
        place, facts, timeout = a_place(rank, world), ranks[rank], timedelta(seconds=seconds)
        if isinstance(facts, BigtrainError):
            excuse(place, facts, timeout)
            return facts
        try:
            return roll_call(place, facts, timeout)
        except BigtrainError as e:
            return e

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


def the_error(outcomes: Mapping[int, object], kind: type[BigtrainError]) -> str:
    """What all ranks raised, in the same words."""
    assert all(type(e) is kind for e in outcomes.values()), outcomes
    words = {str(e) for e in outcomes.values()}
    assert len(words) == 1, words
    return words.pop()


# ---- roll call


def test_all_come(store_host: Any) -> None:
    stores = meet(dict.fromkeys(range(3), FACTS), 3, 20)
    for rank, store in stores.items():
        store.set(f"from {rank}", "x")  # type: ignore[union-attr]
    assert all(s.get("from 2") == b"x" for s in stores.values())  # type: ignore[union-attr]


@pytest.mark.parametrize("late", [0, 1])
def test_an_attempt_does_not_see_the_one_before(late: int, store_host: Any) -> None:
    """Also when a rank comes late: the store of torchrun's agent still holds the verdict of the attempt before."""
    the_error(meet({0: FACTS, 1: FACTS | {"torch": "1"}}, 2, 20), UserError)
    if store_host is None:  # rank 0's store went with its process, which here is garbage that closes a port
        wait_until_free(int(os.environ["MASTER_PORT"]))
    with ThreadPoolExecutor(2) as pool:
        early = pool.submit(meet, {1 - late: FACTS}, 2, 20)
        time.sleep(1)
        assert not early.done()
        outcomes = meet({late: FACTS}, 2, 20) | early.result()
    assert all(isinstance(s, dist.Store) for s in outcomes.values())
    outcomes[0].set("for", "both")  # type: ignore[union-attr]
    assert outcomes[1].get("for") == b"both"  # type: ignore[union-attr]


def test_missing_ranks_are_named_on_every_rank_that_came(store_host: Any) -> None:
    begin = time.monotonic()
    message = the_error(meet({0: FACTS, 2: FACTS}, 5, 1.5), RunError)
    assert "ranks 1, 3-4 of 5 did not come within 1.5 s" in message
    assert os.environ["MASTER_PORT"] in message
    assert "launcher printed" in message
    assert time.monotonic() - begin < 1.5 + 3  # rank 0 stays for the others when its store ends with it


def test_rank_0_missing(store_host: Any) -> None:
    begin = time.monotonic()
    message = the_error(meet({1: FACTS, 2: FACTS}, 3, 1), RunError)
    assert "rank 0" in message
    assert "did not come within 1 s" in message
    assert time.monotonic() - begin < 3


def test_the_differing_key_is_named_on_every_rank(store_host: Any) -> None:
    other = FACTS | {"config": CONFIG.replace("0.001", "0.002").replace("# the peak", "# another comment")}
    message = the_error(meet({0: FACTS, 1: FACTS, 2: other, 3: other}, 4, 20), UserError)
    assert "ranks 2-3: optim.lr = 0.002 (rank 0: 0.001)\n" in message
    assert "kind" not in message
    assert "same command and the same config file" in message


def test_a_difference_does_not_wait_for_those_who_miss(store_host: Any) -> None:
    begin = time.monotonic()
    message = the_error(meet({0: FACTS, 1: FACTS | {"code": "cd" * 32}}, 3, 20), UserError)
    assert "rank 1: code = cdcdcdcdcdcd (rank 0: abababababab)" in message
    assert "install the same version of bigtrain" in message
    assert time.monotonic() - begin < 6


def test_different_world_sizes(store_host: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(meet, {0: FACTS}, 2, 20)
        two = pool.submit(meet, {2: FACTS}, 3, 20)
        message = the_error(one.result() | two.result(), UserError)
    assert "rank 2: world = 3 (rank 0: 2)" in message


@pytest.mark.parametrize("away", [0, 1])
def test_an_excuse_is_raised_on_every_rank(away: int, store_host: Any) -> None:
    trouble = UserError("no such file", where="gpt.toml", do="create it")
    outcomes = meet({0: FACTS, 1: FACTS, 2: FACTS} | {away: trouble}, 3, 20)
    assert outcomes.pop(away) is trouble
    message = the_error(outcomes, UserError)
    assert message == f"rank {away}: gpt.toml: no such file\n  -> create it"


def test_rank_0_ends_while_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "import time, datetime, torch.distributed as d\n"
        "s = d.TCPStore('127.0.0.1', 0, None, True, datetime.timedelta(seconds=30), wait_for_workers=False)\n"
        "print(s.port, flush=True)\n"
        "s.get('bigtrain/no such key')"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", server.stdout.readline().strip())
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(roll_call, a_place(1, 2), FACTS, timedelta(seconds=20))
            time.sleep(0.5)
            server.kill()
            with pytest.raises(RunError, match="rank 0 ended while the ranks met"):
                waiting.result(5)


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(RunError, match=rf"127.0.0.1:{port}.*port {port}.*another process does") as e:
            roll_call(a_place(0, 2), FACTS, timedelta(seconds=5))
    assert "MASTER_PORT to a free port" in str(e.value)


def test_a_host_without_a_store(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(RunError, match=r"no-such-host.invalid:29500: rank 0 did not come within 0.5 s"):
        roll_call(a_place(1, 2), FACTS, timedelta(seconds=0.5))
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(UserError, match="MASTER_PORT=http is no port"):
        roll_call(a_place(1, 2), FACTS, timedelta(seconds=0.5))
    assert capfd.readouterr().err == ""  # torch would print a C++ stack


# ---- what differs


def test_differences_of_texts() -> None:
    many = "[a]\n" + "".join(f"k{i} = {{}}\n" for i in range(8))
    assert difference("config", many.format(*range(8)), many.format(*range(1, 9))) == (
        "a.k0 = 1 (rank 0: 0); a.k1 = 2 (rank 0: 1); a.k2 = 3 (rank 0: 2); a.k3 = 4 (rank 0: 3); "
        "a.k4 = 5 (rank 0: 4); and 3 more"
    )
    assert difference("config", "[a]\nb = 1\n", "[a]\nb = 1\nc = 'x'\n") == 'a.c = "x" (rank 0: nothing)'
    assert difference("config", "# one\nb = 1\n", "# two\nb = 1\n") == ""
    assert difference("log", "plain text\nx", "plain text\ny") == "line 2 = y (rank 0: x)"
    assert difference("torch", "2.13.0", "") == "torch = nothing (rank 0: 2.13.0)"


def test_ranks_in_words() -> None:
    assert rollcall.ranks_named([3]) == "rank 3"
    assert rollcall.ranks_named([9, 8, 1, 10]) == "ranks 1, 8-10"
    assert rollcall.ranks_named(range(0, 100, 2)) == "ranks 0, 2, 4, 6, 8, 10, 12, 14, 16, 18 ... (50 ranks)"


def test_the_digest_follows_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert len(code_digest()) == 64
    assert code_digest() == code_digest()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/a.py").write_text("x = 1\n")
    monkeypatch.setattr(rollcall, "__file__", str(tmp_path / "rollcall.py"))
    seen = {code_digest()}
    (tmp_path / "inner/a.py").write_text("x = 2\n")
    seen.add(code_digest())
    (tmp_path / "inner/a.py").rename(tmp_path / "inner/b.py")
    seen.add(code_digest())
    (tmp_path / "notes.txt").write_text("no code")
    seen.add(code_digest())
    assert len(seen) == 3
