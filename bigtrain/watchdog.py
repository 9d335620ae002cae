"""The watchdog: notices a rank that died, hangs or is cut off, says which, where and in what, and ends the run.

The main thread counts its progress in a plain integer. Each rank has two threads. The talker writes a heartbeat into
the store where the ranks met, every few seconds, and reads those of the two neighbouring ranks: six requests a beat,
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
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import RunError, UserError
from bigtrain.heartbeat import Pulse, Talker, Timer, answer_seconds
from bigtrain.inquest import Report, doing
from bigtrain.mesh import Mesh
from bigtrain.rollcall import within
from bigtrain.signals import StopFlag
from bigtrain.whereabouts import whereabouts, write_flight, write_stacks

HANG_SECONDS = 600.0
"""Without progress for so long the main thread hangs. Longer than any step, save or evaluation should take without a
mark; torch's own limit for a collective is three times that (`mesh.COLLECTIVE_TIMEOUT`)."""
_SLOW = 3.0
"""Times HANG_SECONDS: before the first step is done (building, loading, compiling), while saving, at the end."""
_LONGEST = 10.0
"""Times the longest wait that this phase has survived: slow runs may be slow."""


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
        self.wake = threading.Event()
        self.stop: StopFlag | None = None
        self.awake = 0.0
        self._marks = Timer()
        self._alarm = ""
        self._asked = ""
        self._verdict: str | None = None
        self._heard = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._talker: Talker | None = None
        self._rank, self._world, self.beat = 0, 1, 1.0

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
        self.beat = max(0.05, min(5.0, self.seconds / 60), mesh.world / 2000)
        if mesh.world > 1 and mesh.store is not None:
            self._talker = Talker(self, mesh)
            self._start("bigtrain-talk", self._talk)
        self._start("bigtrain-watch", self._watch)

    def share(self, stop: StopFlag) -> None:
        """Tell all ranks within a heartbeat when this one is asked to stop, and set `stop.elsewhere` for theirs."""
        self.stop = stop
        stop.heard = self.wake.set

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
        self.wake.set()
        self._heard.wait(4 * answer_seconds(self.beat))
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
        self.wake.set()
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
        marks, rounds, last, before = self._marks, Timer(), time.monotonic(), self.pulse.phase
        longest: dict[str, float] = {}
        while not self._stop.wait(self.beat):
            now = time.monotonic()
            self.awake += min(now - last, 2 * self.beat)  # a suspended job is not late
            last = now
            survived = self.awake - marks.since
            if marks.value is not None and self.pulse.count != marks.value:
                longest[before] = max(survived, longest.get(before, 0.0))
            before = self.pulse.phase
            self.idle = marks.same_for(self.pulse.count, self.awake)
            self.limit = self._limit(longest.get(before, 0.0))
            if self._talker is not None and not self._talker.left and self.pulse.phase != "ending":
                silent = rounds.same_for(self._talker.rounds, self.awake)
                if silent > self._talker.patience:
                    self.end(self._talker.cut_off(silent))
            if self.idle > self.limit:
                if self._talker is None or self._talker.left:
                    self.end(f"rank {self._rank} hangs: {doing(self.report())}")
                self._alarm = self._alarm or "no progress"
                self.wake.set()

    def _limit(self, survived: float) -> float:
        """Seconds that the main thread may be without progress now."""
        pulse = self.pulse
        slow = not pulse.stepped or pulse.phase in (
            "starting",
            "saving",
            "rolling back",
            "evaluating",
            "ending",
        )
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
            self.wake.wait(self.beat)
            self.wake.clear()
        talker.say_goodbye()

    def _settle(self, talker: Talker) -> None:
        """An alarm: report, hear the verdict, and end or go on."""
        verdict = talker.inquire(self._alarm or self._asked, self.report())
        self._alarm = ""
        if verdict is None:  # the one who asked for reports gave no verdict
            verdict = f"an alarm was raised, and then nothing was heard of it; rank {self._rank} " + doing(
                self.report()
            )
        if verdict:
            self.end(verdict, settled=True)
        elif self._asked:
            self._heard.set()
        else:  # some rank gets on: as long again
            self._marks.since = self.awake

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

    # ---- the end

    def end(self, verdict: str, *, settled: bool = False) -> None:
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
            how = write_flight(self.folder, self._rank)
            return f"\n  -> stacks: {self.folder / name}{'; ' + how if how else ''}"

        try:
            return within(10.0, write)
        except Exception as e:  # a full disk, a hanging file system
            return f"\n  -> no stacks could be written: {type(e).__name__}: {e}"


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
