"""Heartbeats in the store: one rank's side of the talk among all, and the inquest when somebody raises the alarm.

Each rank writes its own heartbeat and reads those of the two neighbouring ranks, whatever the world's size. Only the
rank that was the first to raise an alarm reads a report of every rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.inquest import Report, Silent, doing, judge, process_state
from bigtrain.lastwords import reachable
from bigtrain.mesh import Mesh
from bigtrain.rollcall import agent_hosts, store_host, within

if TYPE_CHECKING:
    from bigtrain.watchdog import Watchdog

_log = logging.getLogger(__name__)

SILENT = 0.2
"""Part of the watchdog's limit after which a heartbeat that does not come is missed: no thread of a sound process
sleeps so long."""
ANSWER = 3.0
"""Seconds, and beats, that ranks get to answer an alarm."""


@dataclass
class Pulse:
    """What the main thread leaves for the watchdog: a count that grows, and what it is about."""

    count: int = 0
    phase: str = "starting"
    step: int = 0
    """The one that is being made, from 1; 0 before."""
    stepped: bool = False
    """Whether a step was done in this process."""
    own: tuple[int, float, float] | None = None
    """(step, seconds of its work that no other rank can slow down, seconds of it all): see `bigtrain.stragglers`."""

    def mark(self, phase: str, step: int | None = None) -> None:
        """The main thread gets on."""
        self.phase = phase
        if step is not None:
            self.step = step
        self.count += 1


@dataclass
class Timer:
    """How long something has been the same, on a clock that only counts time awake."""

    value: object = None
    since: float = 0.0

    def same_for(self, value: object, now: float) -> float:
        """Seconds since the value changed."""
        if value != self.value:
            self.value, self.since = value, now
        return now - self.since


def answer_seconds(beat: float) -> float:
    """How long an alarm waits for answers, where a heartbeat comes every `beat` seconds."""
    return ANSWER + ANSWER * beat


class Talker:
    """A rank's side of the talk in the store. Only `round`, `alarmed` and `inquire` speak to it: the talking thread."""

    def __init__(self, dog: Watchdog, mesh: Mesh) -> None:
        self.dog, self.rank, self.world = dog, mesh.rank, mesh.world
        self.rounds = 0
        self.left = False
        self.patience = max(SILENT * dog.seconds, 5 * dog.beat)
        self._shared = mesh.store
        # A connection of its own: a thread that waits for NCCL's set-up holds the common one.
        self._store: Any = mesh.store.clone()
        self._host = socket.gethostname()
        self._case = 0
        self._beats = 0
        self._gathered = time.monotonic()
        self._refused_since: float | None = None
        self._trouble = ""
        self._who: dict[int, Mapping[str, Any]] = {}
        self._timers: dict[int, Timer] = {}
        self._neighbours = sorted({(mesh.rank - 1) % mesh.world, (mesh.rank + 1) % mesh.world} - {mesh.rank})
        self._store.set(f"watch/who/{self.rank}", json.dumps(identity()))

    # ---- heartbeats

    def round(self) -> str:
        """Beat and look at the neighbours; what is wrong with one, "" when nothing is."""
        if not reachable(self._shared):  # else every request prints a C++ stack
            raise ConnectionError("nothing listens where the store was")
        if self._trouble:
            self._store = self._shared.clone()
        self.say_beat()
        self._share_stop()
        for other in self._neighbours:
            if finding := self._look_at(other):
                return finding
        if self.rank == 0 and self.dog.gather and time.monotonic() - self._gathered >= self.dog.gather:
            self._gathered = time.monotonic()
            self.dog.compare(self._all_beats())
        return self._word()

    def say_beat(self) -> None:
        """Write this rank's heartbeat."""
        pulse = self.dog.pulse
        self._beats += 1
        told = {
            "n": self._beats,
            "step": pulse.step,
            "phase": pulse.phase,
            "own": pulse.own,
            "left": self.left,
        }
        self._store.set(f"watch/beat/{self.rank}", json.dumps({**told, "host": self._host}))

    def _share_stop(self) -> None:
        """Tell that this rank was asked to stop, or hear that another one was."""
        stop = self.dog.stop
        if stop is None or stop.elsewhere:
            return
        if stop:
            self._store.set("watch/stop", str(self.rank))
        stop.elsewhere = self._store.check(["watch/stop"])

    def _beat_of(self, rank: int) -> dict[str, Any]:
        """A rank's last heartbeat; empty before its first."""
        key = f"watch/beat/{rank}"
        found: dict[str, Any] = json.loads(self._store.get(key)) if self._store.check([key]) else {}
        return found

    def _look_at(self, other: int) -> str:
        """What is wrong with a neighbour."""
        beat = self._beat_of(other)
        if beat.get("left"):
            return ""
        if other not in self._who:
            self._process(other)  # to know it when the store is gone
        timer = self._timers.setdefault(other, Timer(None, self.dog.awake))
        silent = timer.same_for(beat.get("n"), self.dog.awake)
        if silent > self.patience:
            return f"no heartbeat of rank {other} for {silent:.0f} s"
        # Its heartbeat is late: see whether it can still come.
        if silent > 2 * self.dog.beat and (seen := self._process(other)) and "gone" in seen:
            return f"rank {other}: {seen}"
        return ""

    def _process(self, other: int) -> str:
        """What this machine sees of another rank's process; "" where it is not on this machine."""
        if other not in self._who:
            key = f"watch/who/{other}"
            if not self._store.check([key]):
                return ""
            self._who[other] = json.loads(self._store.get(key))
        who, ours = self._who[other], identity()
        if who["machine"] != ours["machine"]:
            return ""
        stat = stat_of(who["process"])
        return process_state(stat if stat and stat["began"] == who["began"] else None)

    def _word(self) -> str:
        """That another rank has left word of its own failure, and this one waits for it in vain."""
        if not self._store.check(["roll/word"]):
            return ""
        timer = self._timers.setdefault(-1, Timer("word", self.dog.awake))
        # Its end usually breaks our connections, and the main thread hears of it by itself.
        if timer.same_for("word", self.dog.awake) < ANSWER + 2 * self.dog.beat:
            return ""
        if self.dog.idle < ANSWER:
            return ""
        word = json.loads(self._store.get("roll/word"))
        self.dog.end(f"stopped because of rank {word['rank']}: {word['message']}")
        return ""

    def _all_beats(self) -> dict[int, Mapping[str, Any]]:
        """The last heartbeats of all ranks; empty before everybody has beaten."""
        keys = [f"watch/beat/{rank}" for rank in range(self.world)]
        if not self._store.check(keys):
            return {}
        return {rank: json.loads(text) for rank, text in enumerate(self._store.multi_get(keys))}

    # ---- trouble with the store itself

    def well(self) -> None:
        """A round went well."""
        self.rounds += 1
        self._trouble, self._refused_since = "", None

    def ill(self, error: Exception) -> None:
        """A round failed: try by a new connection next time; end when nobody listens there any more."""
        self._trouble = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        if self.left or self.dog.pulse.phase == "ending":  # the others may have gone, and the store with them
            return
        _log.warning("no heartbeat: %s", self._trouble)
        answer = reachable(self._shared)
        if answer is True:
            return
        # Refused: the store's process has ended, perhaps because the run has. Silence may be a cut link: patience.
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if answer is False and now - self._refused_since > max(5.0, 3 * self.dog.beat):
            self.dog.end(f"{store_host()} ended, and the store with it")

    def cut_off(self, silent: float) -> str:
        """The verdict when the store does not answer."""
        why = f" ({self._trouble})" if self._trouble else ""
        if not agent_hosts() and 0 in self._who and "stopped" in (seen := self._process(0)):
            self._kill(0)
            return f"rank 0 on {self._who[0]['host']}, which holds the store, does not answer ({seen})"
        holder = "torchrun's agent on rank 0's machine" if agent_hosts() else "rank 0"
        return (
            f"rank {self.rank} on {socket.gethostname()} is cut off: {holder}, which holds the store, has not answered "
            f"for {silent:.0f} s{why}; this rank {doing(self.dog.report())}"
        )

    # ---- the inquest

    def alarmed(self) -> bool:
        """Whether some rank has raised the alarm."""
        return bool(self._store.check([f"watch/alarm/{self._case}"]))

    def inquire(self, why: str, report: Report) -> str | None:
        """Raise the alarm or answer it. The verdict: "" when all may go on; None when it did not come."""
        case, seconds = self._case, answer_seconds(self.dog.beat)
        word = json.dumps({"rank": self.rank, "why": why})
        raised = json.loads(self._store.compare_set(f"watch/alarm/{case}", "", word))
        self._store.set(f"watch/report/{case}/{self.rank}", json.dumps(asdict(report)))
        self._store.add(f"watch/came/{case}", 1)
        key, testified = f"watch/verdict/{case}", dict.fromkeys(self._neighbours, "")

        def all_came() -> bool:
            self._testify(case, testified)
            dead = self._store.add(f"watch/dead/{case}", 0)
            return bool(self._store.add(f"watch/came/{case}", 0) + dead >= self.world)

        def judged() -> bool:
            self._testify(case, testified)
            return bool(self._store.check([key]))

        if raised["rank"] == self.rank:
            self._until(all_came, seconds)
            verdict = self._judge(case)
            _log.warning("alarm (%s): %s", why, verdict or "some rank gets on; the others wait for it")
            self._store.set(key, json.dumps(verdict))
        elif not self._until(judged, 2 * seconds):
            return None
        verdict = json.loads(self._store.get(key))
        self._store.add(f"watch/heard/{case}", 1)
        self._case += 1
        self._timers.clear()
        return str(verdict)

    def _testify(self, case: int, testified: dict[int, str]) -> None:
        """Tell the judge of neighbours' processes: it may be on another machine, and need not wait for a dead one."""
        for other, before in testified.items():
            seen = self._process(other)
            if seen == before:
                continue
            testified[other] = seen
            self._store.set(f"watch/seen/{case}/{other}", seen)
            if "gone" in seen and self._store.add(f"watch/dead/{case}/{other}", 1) == 1:
                self._store.add(f"watch/dead/{case}", 1)

    def _judge(self, case: int) -> str:
        """Read all reports; what they come to."""
        reports, silent = [], []
        for rank in range(self.world):
            self.rounds += 1
            key = f"watch/report/{case}/{rank}"
            if self._store.check([key]):
                reports.append(Report(**json.loads(self._store.get(key))))
                continue
            beat = self._beat_of(rank)
            if beat.get("left"):
                continue
            key = f"watch/seen/{case}/{rank}"
            seen = str(self._store.get(key).decode()) if self._store.check([key]) else self._process(rank)
            who = self._who.get(rank, {})
            if not who and self._store.check([f"watch/who/{rank}"]):
                who = json.loads(self._store.get(f"watch/who/{rank}"))
            host, phase = who.get("host", "an unknown machine"), beat.get("phase", "starting")
            silent.append(Silent(rank, host, beat.get("step", 0), phase, seen))
        return judge(reports, silent)

    def _until(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Ask ever more slowly until `ready`; False after `seconds`."""
        deadline, pause = time.monotonic() + seconds, 0.01
        while not ready():
            self.rounds += 1  # the store answers: a wait for other ranks is not a cut link
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, max(0.1, self.world / 20_000))
        return True

    # ---- leaving

    def leave(self) -> None:
        """The others are not to miss this rank. Never raises; the last heartbeat has a second."""
        if self.left:
            return
        self.left = True
        self.dog.wake.set()
        self.say_goodbye()

    def say_goodbye(self) -> None:
        """The last heartbeat says that it leaves; the talking thread repeats it, whose own may have come after."""
        with contextlib.suppress(Exception):
            if reachable(self._shared):
                within(1.0, self.say_beat)

    def _kill(self, other: int) -> None:
        """End a rank on this machine that does not end by itself: launchers wait for every rank."""
        if (seen := self._process(other)) and "gone" not in seen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self._who[other]["process"]), 9)

    def finish(self) -> None:
        """After a verdict: kill neighbours that it cannot reach, and let others read it before the store goes."""
        with contextlib.suppress(Exception):
            within(ANSWER + 1.0, self._finish)

    def _finish(self) -> None:
        case = self._case - 1
        if case < 0 or self._trouble:
            return
        for other in self._neighbours:
            if other in self._who and not self._store.check([f"watch/report/{case}/{other}"]):
                self._kill(other)
        if self.rank == 0 and not agent_hosts():
            came = self._store.add(f"watch/came/{case}", 0)
            self._until(lambda: self._store.add(f"watch/heard/{case}", 0) >= came, ANSWER)


def identity() -> dict[str, Any]:
    """This process among all: its machine (and container), its number there, and when that was given."""
    stat = stat_of(os.getpid())
    try:
        space = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: nobody's process can be looked up
        space, boot = "", f"{socket.gethostname()} {os.getpid()}"
    return {
        "host": socket.gethostname(),
        "machine": f"{boot} {space}",
        "process": os.getpid(),
        "began": stat["began"] if stat else "",
    }


def stat_of(process: int) -> dict[str, str] | None:
    """State and start time of a process from /proc; None when there is none of this number."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    fields: Sequence[str] = text.rpartition(")")[2].split()  # its name may hold blanks and brackets
    return {"state": fields[0], "began": fields[19]}
