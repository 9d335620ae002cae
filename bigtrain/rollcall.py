"""Roll call: who came, and are they about to do the same; and what a rank that fails leaves for the others.

Rank 0 publishes its facts (config, code, versions). Each other rank compares its own, says what differs and
reports; rank 0 counts, and gives one verdict that all ranks raise in the same words. Only rank 0 reads more than
a handful of keys, so that 16,384 ranks cost one store as much as torch's own rendezvous does.

The store is asked, never waited on: torch's waits print C++ stack traces when they time out, cannot be
interrupted, and some ignore their timeout when the host is frozen.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import socket
import threading
import time
import tomllib
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from bigtrain.errors import BigtrainError, RunError, UserError
from bigtrain.place import Place

T = TypeVar("T")

_LISTED = 10
"""Ranks, or ranges of them, that a message names before it only counts."""
_KEYS = 5
"""Differing keys of a config that a message shows."""
GRACE = 1.0
"""Seconds from the first difference to the verdict, so that other ranks' differences are in it too."""
_LINGER = 3.0
"""Seconds that rank 0 stays at most for the others to hear a bad verdict."""


def roll_call(place: Place, facts: Mapping[str, str], timeout: timedelta) -> Store:
    """Meet the other ranks at MASTER_ADDR:MASTER_PORT, each with the same `facts`; the store that all share.

    Raises UserError when a rank's facts differ from rank 0's, or the error of a rank that sent an excuse; RunError
    naming the ranks that did not come within `timeout`, or saying why the store cannot be reached: the same error
    on every rank that came.
    """
    return _meet(place, facts, timeout)


def excuse(place: Place, error: BigtrainError, timeout: timedelta) -> None:
    """Answer the roll call with the error that keeps this rank away, so that no other waits for it. Never raises."""
    try:
        _meet(place, {}, timeout, error)
    except Exception:
        return  # the verdict on `error`, or nobody to tell it


def _meet(
    place: Place, facts: Mapping[str, str], timeout: timedelta, trouble: BigtrainError | None = None
) -> Store:
    """As roll_call; `trouble` is this rank's own error."""
    store = _connect(place, timeout)
    here = Roll(place, {**facts, "world": str(place.world)}, timeout.total_seconds(), store, trouble)
    # Rank 0 may come one timeout after this one, and give its verdict one later.
    patience = 2 * timeout.total_seconds() + 2 * _LINGER
    try:
        verdict = within(patience, here.call if place.rank == 0 else here.answer)
    except TimeoutError as e:
        raise RunError(f"the store stopped answering for {patience:g} s", where=_address(), do=_LOOK) from e
    except RuntimeError as e:  # torch's DistNetworkError and DistStoreError among them
        raise RunError(f"{store_host()} ended while the ranks met", where=_address(), do=_LOOK) from e
    if verdict["kind"]:
        kind = UserError if verdict["kind"] == "UserError" else RunError
        raise kind(verdict["what"], where=verdict["where"], do=verdict["do"])
    return here.store


_GOOD = {"kind": "", "what": "", "where": "", "do": ""}
_LOOK = "see what the launcher printed for the other ranks: the first that failed says why"
_ALIKE = {
    "world": "start all ranks by one launcher: they were told different world sizes",
    "code": "install the same version of bigtrain on every machine",
    "torch": "install the same version of torch on every machine",
    "device": "run nvidia-smi on the machine without a working GPU: drain or repair it, or leave it out",
}
"""What to do about a fact that differs; for all others, the same command."""


class Roll:
    """One rank's part in a roll call.

    The store of torchrun's agent outlives the ranks and remembers the attempts before, so each attempt has keys of
    its own, under a name that rank 0 draws. TORCHELASTIC_RESTART_COUNT cannot be that name: of two agents, only the
    one whose rank died counts the restart (`_remaining_restarts` in torch's elastic agent). And a rank must not take
    the name that it finds for the one of today: rank 0 renews it while it calls the roll, and the others wait for
    that.
    """

    def __init__(
        self,
        place: Place,
        facts: Mapping[str, str],
        seconds: float,
        store: Store,
        trouble: BigtrainError | None,
    ) -> None:
        """`seconds`: how long a rank is waited for."""
        self.rank, self.world = place.rank, place.world
        self.facts, self.seconds, self.agents = facts, seconds, PrefixStore("bigtrain", store)
        self.trouble = _verdict(trouble, place.rank) if trouble else None
        # All ranks together ask about 20,000 times a second at most.
        self.pause = min(1.0, max(0.1, place.world / 20_000))
        self.renewed = 0
        self.attempt = uuid.uuid4().hex  # of rank 0

    def renew(self) -> None:
        """Rank 0: say that this attempt is alive."""
        self.renewed += 1
        self.agents.set("now", f"{self.attempt} {self.renewed}")

    def join(self) -> bool:
        """Any other rank: learn the name of the attempt from a rank 0 that lives; False after `seconds`."""

        def now() -> str:
            return self.agents.get("now").decode() if self.agents.check(["now"]) else ""

        before = now()
        if not self.until(lambda: now() != before, self.seconds):
            return False
        self.store = PrefixStore(now().split()[0], self.agents)
        return True

    def call(self) -> dict[str, str]:
        """Rank 0: publish, count, judge. The verdict."""
        self.store = PrefixStore(self.attempt, self.agents)
        self.store.set("roll/facts", json.dumps(dict(self.facts)))
        verdict = self.trouble or self.judge()
        self.store.set("roll/verdict", json.dumps(verdict))
        if verdict["kind"]:
            self.until(self.all_heard, _LINGER)
        return verdict

    def all_came(self) -> bool:
        """Whether all others have answered."""
        self.renew()
        return int(self.store.add("roll/came", 0)) >= self.world - 1

    def all_heard(self) -> bool:
        """Whether all others have read the verdict."""
        self.renew()
        return int(self.store.add("roll/read", 0)) >= self.world - 1

    def judge(self) -> dict[str, str]:
        """Wait for the others, and compare what they answered."""
        deadline = time.monotonic() + self.seconds
        self.until(lambda: self.all_came() or self.store.queue_len("roll/odd") > 0, self.seconds)
        self.until(self.all_came, min(GRACE, deadline - time.monotonic()))
        missing = []
        if not self.all_came():
            missing = [r for r in range(1, self.world) if not self.store.check([f"roll/here/{r}"])]
        # After the missing: who is here has said before what differs.
        odd = [json.loads(self.store.queue_pop("roll/odd")) for _ in range(self.store.queue_len("roll/odd"))]
        for one in odd:
            if "trouble" in one:
                return dict(one["trouble"])
        if odd:
            return self.unlike(odd)
        return self.absent(missing) if missing else _GOOD

    def unlike(self, odd: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """The verdict on ranks whose facts differ, those that differ alike on one line."""
        groups: dict[str, list[int]] = {}
        for one in odd:
            groups.setdefault(one["differs"], []).append(one["rank"])
        lines = [f"{ranks_named(ranks)}: {differs}" for differs, ranks in groups.items()]
        if len(lines) > _LISTED:
            lines[_LISTED:] = [f"and {len(lines) - _LISTED} more"]
        names = {name for one in odd for name in one["names"]}
        advice = [text for name, text in _ALIKE.items() if name in names]
        if names - _ALIKE.keys():
            advice.insert(0, "start every rank with the same command and the same config file")
        return {
            "kind": "UserError",
            "what": "the ranks were not started alike\n  " + "\n  ".join(lines),
            "where": _address(),
            "do": "; ".join(advice),
        }

    def absent(self, missing: Sequence[int]) -> dict[str, str]:
        """The verdict on ranks that did not come."""
        return {
            "kind": "RunError",
            "what": f"{ranks_named(missing)} of {self.world} did not come within {self.seconds:g} s",
            "where": _address(),
            "do": "see what the launcher printed for them: a rank that fails at start-up says why; all need the "
            "same MASTER_ADDR and MASTER_PORT",
        }

    def answer(self) -> dict[str, str]:
        """Any other rank: compare, report, hear the verdict. Raises RunError when rank 0 is not there."""
        if not self.join():
            raise RunError(
                f"rank 0 of {self.world} did not come within {self.seconds:g} s", where=_address(), do=_LOOK
            )
        theirs = json.loads(self.store.get("roll/facts"))
        names = [name for name in sorted({*theirs, *self.facts}) if theirs.get(name) != self.facts.get(name)]
        texts = {name: difference(name, theirs.get(name, ""), self.facts.get(name, "")) for name in names}
        texts = {name: text for name, text in texts.items() if text}
        if self.trouble:
            self.store.queue_push("roll/odd", json.dumps({"trouble": self.trouble}))
        elif texts:
            odd = {"rank": self.rank, "names": list(texts), "differs": "; ".join(texts.values())}
            self.store.queue_push("roll/odd", json.dumps(odd))
        self.store.set(f"roll/here/{self.rank}", "")
        self.store.add("roll/came", 1)
        if not self.until(lambda: self.store.check(["roll/verdict"]), self.seconds + _LINGER):
            raise RunError("rank 0 came, and ended before all had", where=_address(), do=_LOOK)
        verdict: dict[str, str] = json.loads(self.store.get("roll/verdict"))
        self.store.add("roll/read", 1)
        return verdict

    def until(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Ask ever more slowly until `ready`; False after `seconds`."""
        deadline, pause = time.monotonic() + seconds, 0.005
        while not ready():
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, self.pause)
        return True


def _verdict(error: BigtrainError, rank: int) -> dict[str, str]:
    """A rank's own error, for all to raise."""
    kind = "UserError" if isinstance(error, UserError) else "RunError"
    where = f"rank {rank}" + (f": {error.where}" if error.where else "")
    return {"kind": kind, "what": error.what, "where": where, "do": error.do}


def difference(name: str, theirs: str, ours: str) -> str:
    """What a fact is here and on rank 0, in one line: "optim.lr = 0.1 (rank 0: 0.2)"; "" when only comments differ."""
    if "\n" not in theirs + ours:
        return f"{name} = {_short(ours)} (rank 0: {_short(theirs)})"
    here, there = _entries(ours), _entries(theirs)
    keys = [k for k in {**there, **here} if there.get(k) != here.get(k)]
    shown = [f"{k} = {_short(here.get(k, ''))} (rank 0: {_short(there.get(k, ''))})" for k in keys[:_KEYS]]
    if len(keys) > _KEYS:
        shown.append(f"and {len(keys) - _KEYS} more")
    return "; ".join(shown)


def _short(value: str) -> str:
    """A value that fits a line; a digest by its first 12 digits."""
    if re.fullmatch(r"[0-9a-f]{40,}", value):
        return value[:12]
    return (value if len(value) <= 60 else value[:57] + "...") or "nothing"


def _entries(text: str) -> dict[str, str]:
    """A TOML text by section-qualified key; any other text by line number."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {f"line {i}": line for i, line in enumerate(text.splitlines(), 1)}
    found: dict[str, str] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            found[prefix] = json.dumps(value, default=str)

    walk("", tree)
    return found


def ranks_named(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 8-15": neighbours as a range, a count when the list is cut."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    named = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges[:_LISTED])
    cut = f" ... ({len(ranks)} ranks)" if len(ranges) > _LISTED else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + named + cut


# ---- the store


def agent_hosts() -> bool:
    """Whether torchrun's agent holds the store, so that it outlives rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_host() -> str:
    """Whose end is the store's end."""
    return "torchrun's agent" if agent_hosts() else "rank 0"


def _address() -> str:
    """Where the ranks meet."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _connect(place: Place, timeout: timedelta) -> Store:
    """Host the store on rank 0, or reach it. Raises UserError, RunError."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port", do="set it to a number from 1024 to 65535")
    hosts = place.rank == 0 and not agent_hosts()
    if not hosts:
        _knock(host, int(port), timeout.total_seconds())
    try:
        # What listens there answers within 30 s even when 16,384 ranks ask, or is no store.
        store = TCPStore(
            host,
            int(port),
            None,
            is_master=hosts,
            timeout=min(timeout, timedelta(seconds=30)),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as e:
        raise _refusal(e, hosts) from e
    store.set_timeout(timeout)
    return store


def _refusal(error: RuntimeError, hosts: bool) -> RunError:
    """Why there is no store although something could be reached."""
    if hosts and ("EADDRINUSE" in str(error) or os.strerror(errno.EADDRINUSE).lower() in str(error).lower()):
        return RunError(
            f"rank 0 cannot listen on port {os.environ['MASTER_PORT']}: another process does, perhaps another run",
            where=_address(),
            do="set MASTER_PORT to a free port, the same on all ranks",
        )
    if hosts:
        return RunError(
            "rank 0 listens, but cannot reach itself by this address",
            where=_address(),
            do="set MASTER_ADDR to a name of the machine that rank 0 runs on",
        )
    return RunError(
        "what listens here is not the store of this run",
        where=_address(),
        do="set MASTER_ADDR to the machine of rank 0 and MASTER_PORT to a port that is free there",
    )


def _knock(host: str, port: int, seconds: float) -> None:
    """Wait until something listens; torch's own retries print a C++ stack each. Raises RunError."""
    deadline, pause = time.monotonic() + seconds, 0.02
    while True:
        try:
            left = deadline - time.monotonic()
            socket.create_connection((host, port), timeout=max(0.1, min(5.0, left))).close()
            return
        except OSError as e:  # not yet there, or a name that is not yet known
            reason = e.strerror or str(e)
        if time.monotonic() + pause >= deadline:
            raise RunError(
                f"rank 0 did not come within {seconds:g} s: nothing listens here ({reason})",
                where=_address(),
                do="see what the launcher printed for rank 0; MASTER_ADDR must name its machine, and be reachable",
            )
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def within(seconds: float, work: Callable[[], T]) -> T:
    """`work()` in a thread that is left behind when it hangs. Raises TimeoutError, or what it raised."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as e:
            result.set_exception(e)

    threading.Thread(target=run, daemon=True, name="bigtrain-store").start()
    return result.result(seconds)


# ---- the code


def code_digest() -> str:
    """sha256 over the names and contents of bigtrain's .py files and its kernels': equal when the code is."""
    folders = {"bigtrain": [str(Path(__file__).parent)]}
    kernels = importlib.util.find_spec("bigtrain_kernels")  # found, not imported: that would load triton
    folders["bigtrain_kernels"] = list((kernels and kernels.submodule_search_locations) or [])
    digest = hashlib.sha256()
    for package, places in folders.items():
        for folder in places:
            for file in sorted(Path(folder).rglob("*.py")):
                content = file.read_bytes()
                digest.update(f"{package}/{file.relative_to(folder).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()
