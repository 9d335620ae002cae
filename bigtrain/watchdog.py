"""The watchdog: notices a rank that died, hangs or is cut off, says which, where and in what, and ends the run.

The main thread counts its progress in a plain integer. Each rank has two threads. The talker writes a heartbeat into
the store where the ranks met, every few seconds, and reads those of the two neighbouring ranks: five requests a beat,
whatever the world's size. The other one looks at the main thread's count, and at the talker, which hangs itself when
the link to the store is cut.

Whoever finds something wrong raises the alarm. Every rank that lives answers it with a report; the first that raised it
hears them all and gives the verdict (`bigtrain.inquest`). Where some rank gets on, the others wait rightly, and all go
on. Else every rank writes its stacks into its log, prints the verdict and ends with exit code 1, so that the launcher
starts the run again. Times are counted on each rank's own clock, and only while it is awake: clocks may differ, and a
job may be suspended as a whole.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import RunError, UserError
from bigtrain.inquest import Report, Silent, doing, judge, process_state
from bigtrain.lastwords import reachable
from bigtrain.mesh import Mesh
from bigtrain.rollcall import agent_hosts, store_host, within
from bigtrain.whereabouts import whereabouts, write_flight, write_stacks

_log = logging.getLogger(__name__)

HANG_SECONDS = 600.0
"""Without progress for so long the main thread hangs. Longer than any step, save or evaluation should take without a
mark; torch's own limit for a collective is three times that (`mesh.COLLECTIVE_TIMEOUT`)."""
_SLOW = 3.0
"""Times HANG_SECONDS: before the first step is done (building, loading, compiling), while saving, at the end."""
_LONGEST = 10.0
"""Times the longest wait that this phase has survived: slow runs may be slow."""
_SILENT = 0.2
"""Part of HANG_SECONDS after which a heartbeat that does not come is missed: no thread of a sound process sleeps so
long."""
_ANSWER = 3.0
"""Seconds, and beats, that ranks get to answer an alarm."""


def hang_seconds() -> float:
    """BIGTRAIN_HANG_SECONDS, 600 when it is not set, 0 for no watchdog. Raises UserError for anything else."""
    return _seconds("BIGTRAIN_HANG_SECONDS", HANG_SECONDS, "how long a rank may make no progress")


def gather_seconds() -> float:
    """BIGTRAIN_STRAGGLER_SECONDS, 60 when it is not set, 0 to compare no ranks. Raises UserError."""
    return _seconds("BIGTRAIN_STRAGGLER_SECONDS", 60.0, "how often the ranks' speeds are compared")


def _seconds(name: str, default: float, what: str) -> float:
    given = os.environ.get(name, str(default))
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(given)) <= 604_800:
            return seconds
    raise UserError(
        f"{given!r} is no number of seconds from 0 to 604800 (a week)",
        where=name,
        do=f"set it to {what}, to 0 for never, or unset it for {default:g}",
    )


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
class _Timer:
    """How long something has been the same, on a clock that only counts time awake."""

    value: object = None
    since: float = 0.0

    def same_for(self, value: object, now: float) -> float:
        """Seconds since the value changed."""
        if value != self.value:
            self.value, self.since = value, now
        return now - self.since


class Watchdog:
    """Watches one process; with `watch`, the ranks of a mesh. Every method is the main thread's."""

    def __init__(self, *, seconds: float | None = None, gather: float | None = None) -> None:
        """`seconds`: see `hang_seconds`, which it is by default, as `gather` is `gather_seconds`."""
        self.seconds = hang_seconds() if seconds is None else seconds
        self.gather = gather_seconds() if gather is None else gather
        self.pulse = Pulse()
        self.folder: Path | None = None
        self.abandon: Callable[[str], None] = lambda reason: None
        self.compare: Callable[[Mapping[int, Mapping[str, Any]]], None] = lambda beats: None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._awake = 0.0
        self._marks = _Timer()
        self._alarm = ""
        self._asked = ""
        self._verdict: str | None = None
        self._heard = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._talker: Talker | None = None
        self._rank, self._world, self._beat = 0, 1, 1.0

    @property
    def on(self) -> bool:
        """Whether it watches at all."""
        return self.seconds > 0

    def watch(self, mesh: Mesh) -> None:
        """Begin, once the ranks have met."""
        if not self.on:
            return
        self._rank, self._world = mesh.rank, mesh.world
        # 60 beats in the limit; at most 2,000 heartbeats a second at the store: one in 8 s of each of 16,384 ranks.
        self._beat = max(0.05, min(5.0, self.seconds / 60), mesh.world / 2000)
        if mesh.world > 1 and mesh.store is not None:
            self._talker = Talker(self, mesh)
            self._start("bigtrain-talk", self._talk)
        self._start("bigtrain-watch", self._watch)

    def log_to(self, folder: Path, abandon: Callable[[str], None]) -> None:
        """Where stacks go (rank_N.log), and what to tell of the end of the run before the process ends."""
        self.folder, self.abandon = folder, abandon

    def ask(self, what: str) -> str:
        """The main thread lost its connections (`what` it saw): the verdict on why, "" when there is none in time.

        Returns within some ten beats.
        """
        if self._talker is None or self._stop.is_set():
            return ""
        with self._ending:  # unless the process is ending already
            self._asked = what
        self._wake.set()
        self._heard.wait(4 * self._answer_seconds())
        return self._verdict or ""

    def leave(self) -> None:
        """This rank ends: the others are not to miss it. Its own end is still watched."""
        self.pulse.mark("ending")
        if self._talker is not None:
            self._talker.leave()

    def close(self) -> None:
        """Stop; returns when the threads have ended (at most some seconds when the store hangs)."""
        if self._talker is not None:
            self._talker.leave()
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(5.0)
        self._threads.clear()

    # ---- the threads

    def _start(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self) -> None:
        """Look at the main thread, and at the talker."""
        marks, rounds, last, before = self._marks, _Timer(), time.monotonic(), self.pulse.phase
        longest: dict[str, float] = {}
        while not self._stop.wait(self._beat):
            now = time.monotonic()
            self._awake += min(now - last, 2 * self._beat)  # a suspended job is not late
            last = now
            survived = self._awake - marks.since
            if marks.value is not None and self.pulse.count != marks.value:
                longest[before] = max(survived, longest.get(before, 0.0))
            before = self.pulse.phase
            self.idle = marks.same_for(self.pulse.count, self._awake)
            self.limit = self._limit(longest.get(before, 0.0))
            if self._talker is not None and not self._talker.left and self.pulse.phase != "ending":
                silent = rounds.same_for(self._talker.rounds, self._awake)
                if silent > self._talker.patience:
                    self._end(self._talker.cut_off(silent))
            if self.idle > self.limit:
                if self._talker is None or self._talker.left:
                    self._end(f"rank {self._rank} hangs: {doing(self.report())}")
                self._alarm = self._alarm or "no progress"
                self._wake.set()

    def _limit(self, survived: float) -> float:
        """Seconds that the main thread may be without progress now."""
        pulse = self.pulse
        slow = not pulse.stepped or pulse.phase in ("starting", "saving", "evaluating", "ending")
        return max(self.seconds * (_SLOW if slow else 1.0), _LONGEST * survived)

    def _talk(self) -> None:
        """Beat, and hear the neighbours, until the end."""
        talker = self._talker
        assert talker is not None
        while not self._stop.is_set() and not talker.left:
            try:
                finding = talker.round()
                self._alarm = self._alarm or finding
                if self._alarm or self._asked or talker.alarmed():
                    self._settle(talker)
                talker.well()
            except Exception as e:
                talker.ill(e)
            self._wake.wait(self._beat)
            self._wake.clear()
        with contextlib.suppress(Exception):
            talker.say_beat()  # the last one says that it leaves

    def _settle(self, talker: Talker) -> None:
        """An alarm: report, hear the verdict, and end or go on."""
        verdict = talker.inquire(self._alarm or self._asked, self.report())
        self._alarm = ""
        if verdict is None:  # the one who asked for reports gave no verdict
            verdict = f"an alarm was raised, and then nothing was heard of it; rank {self._rank} " + doing(
                self.report()
            )
        if verdict:
            self._end(verdict, settled=True)
        elif self._asked:
            self._heard.set()
        else:  # some rank gets on: as long again
            self._marks.since = self._awake

    idle = 0.0
    limit = 0.0

    def report(self) -> Report:
        """What this rank says of itself."""
        here = whereabouts()
        return Report(
            rank=self._rank,
            host=socket.gethostname(),
            step=self.pulse.step,
            phase=self.pulse.phase,
            idle=self.idle,
            limit=self.limit or self.seconds,
            where=self._asked or here.where,
            waits=here.waits or bool(self._asked),
            collective=here.collective,
            fails=bool(self._asked),
        )

    def _answer_seconds(self) -> float:
        """How long an alarm waits for answers."""
        return _ANSWER + _ANSWER * self._beat

    # ---- the end

    def _end(self, verdict: str, *, settled: bool = False) -> None:
        """Leave everything that explains it, and end: the main thread by its own error if it asked, else at once."""
        with self._ending:
            where = self._leave_traces(verdict)
            if self._talker is not None and settled:
                self._talker.finish()
            if self._asked:
                self._verdict = verdict
                self._heard.set()
                self._stop.set()
                return
            print(f"[rank {self._rank}] bigtrain: run failed: {verdict}{where}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):  # a disk that hangs is no reason to stay
                within(5.0, lambda: self.abandon(verdict))
            os._exit(RunError.exit_code)

    def _leave_traces(self, verdict: str) -> str:
        """Stacks and the flight recorder; where they are, as the end of a message."""
        name = f"rank_{self._rank}.log"

        def write() -> str:
            if self.folder is None:
                write_stacks(sys.stderr, verdict)
                return ""
            with (self.folder / name).open("a") as file:  # by itself: the run's logging may be closed already
                when = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{when},000 ERROR {__name__}: {verdict}; this rank {doing(self.report())}\n")
                write_stacks(file, f"rank {self._rank}")
            recorded = write_flight(self.folder / f"flight_{self._rank}")
            how = f"; collectives: torchfrtrace --prefix flight_ {self.folder}" if recorded else ""
            return f"\n  -> stacks: {self.folder / name}{how}"

        try:
            return within(10.0, write)
        except Exception as e:  # a full disk, a hanging file system
            return f"\n  -> no stacks could be written: {type(e).__name__}: {e}"


class Talker:
    """A rank's side of the talk in the store. Only `round`, `alarmed` and `inquire` speak to it: the talking thread."""

    def __init__(self, dog: Watchdog, mesh: Mesh) -> None:
        self.dog, self.rank, self.world = dog, mesh.rank, mesh.world
        self.rounds = 0
        self.left = False
        self.patience = max(_SILENT * dog.seconds, 5 * dog._beat)
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
        self._timers: dict[int, _Timer] = {}
        self._neighbours = sorted({(mesh.rank - 1) % mesh.world, (mesh.rank + 1) % mesh.world} - {mesh.rank})
        self._store.set(f"watch/who/{self.rank}", json.dumps(identity()))

    # ---- heartbeats

    def round(self) -> str:
        """Beat and look at the neighbours; what is wrong with one, "" when nothing is."""
        self.say_beat()
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
        timer = self._timers.setdefault(other, _Timer(None, self.dog._awake))
        silent = timer.same_for(beat.get("n"), self.dog._awake)
        if silent > self.patience:
            return f"no heartbeat of rank {other} for {silent:.0f} s"
        # Its heartbeat is late: see whether it can still come.
        if silent > 2 * self.dog._beat and (seen := self._process(other)) and "gone" in seen:
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
        timer = self._timers.setdefault(-1, _Timer("word", self.dog._awake))
        # Its end usually breaks our connections, and the main thread hears of it by itself.
        if timer.same_for("word", self.dog._awake) < _ANSWER + 2 * self.dog._beat:
            return ""
        if self.dog.idle < _ANSWER:
            return ""
        word = json.loads(self._store.get("roll/word"))
        self.dog._end(f"stopped because of rank {word['rank']}: {word['message']}")
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
            with contextlib.suppress(Exception):
                self._store = self._shared.clone()
            return
        # Refused: the store's process has ended, perhaps because the run has. Silence may be a cut link: patience.
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if answer is False and now - self._refused_since > max(5.0, 3 * self.dog._beat):
            self.dog._end(f"{store_host()} ended, and the store with it")

    def cut_off(self, silent: float) -> str:
        """The verdict when the store does not answer."""
        why = f" ({self._trouble})" if self._trouble else ""
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
        case, seconds = self._case, self.dog._answer_seconds()
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
        """The others are not to miss this rank. Never raises; the heartbeat that says so has a second."""
        if self.left:
            return
        self.left = True
        self.dog._wake.set()
        with contextlib.suppress(Exception):
            within(1.0, self.say_beat)

    def finish(self) -> None:
        """After a verdict: kill neighbours that it cannot reach, and let others read it before the store goes."""
        with contextlib.suppress(Exception):
            within(_ANSWER + 1.0, self._finish)

    def _finish(self) -> None:
        case = self._case - 1
        if case < 0 or self._trouble:
            return
        for other in self._neighbours:
            who = self._who.get(other)
            if who is None or self._store.check([f"watch/report/{case}/{other}"]):
                continue
            if "its process" in self._process(other) and "gone" not in self._process(other):
                # Launchers wait for every rank, and this one would not end by itself.
                os.kill(int(who["process"]), 9)
        if self.rank == 0 and not agent_hosts():
            came = self._store.add(f"watch/came/{case}", 0)
            self._until(lambda: self._store.add(f"watch/heard/{case}", 0) >= came, _ANSWER)


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


def crash_stacks(folder: Path, rank: int) -> Callable[[], None]:
    """Let a crash (SIGSEGV and the like) write all stacks into the rank's log; what undoes it."""
    if faulthandler.is_enabled():  # somebody else's, a test's or a user's
        return lambda: None
    file = (folder / f"rank_{rank}.log").open("a")
    faulthandler.enable(file, all_threads=True)

    def undo() -> None:
        faulthandler.disable()
        file.close()

    return undo
