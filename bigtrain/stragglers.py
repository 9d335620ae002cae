"""Stragglers: how long each rank's own work takes, and who needs longer than its peers, again and again.

Ranks that work together end their steps together: a step's time says nothing of who was slow. What tells is work that
waits for no other rank: reading the data, and the forward passes of the layers. Each rank times them every few steps,
by host clock on a CPU and by events in the stream on a GPU (no synchronisation), and its heartbeat carries the median
of the last ones to rank 0. Ranks of one tensor or context group do wait for each other within a layer, so they are slow
together; pipeline stages hold different layers, so a rank is compared with those of its own stage.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigtrain.grid import Grid
from bigtrain.heartbeat import Pulse
from bigtrain.rollcall import ranks_named

EVERY = 10
"""Steps between two that are timed, the same ones on all ranks: some 2 microseconds a layer and microbatch."""
_RECENT = 5
"""Timed steps whose median a heartbeat carries."""
RATIO = 1.2
"""A rank is slow whose own work takes so many times its peers' median..."""
SHARE = 0.05
"""...and by at least so much of a step longer: less would not be felt."""
TIMES = 3
"""Comparisons in a row that it takes to be named."""


class OwnTime:
    """Times a rank's own work, for its pulse. All calls are the main thread's."""

    def __init__(self, pulse: Pulse, device: torch.device) -> None:
        self.pulse, self.device = pulse, device
        self._timing = False
        self._seconds = 0.0
        self._began = 0.0
        self._step = 0
        self._entered: Any = None
        self._events: list[tuple[Any, Any]] = []
        self._unread: tuple[int, float, float] | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def follow(self, layers: Iterable[nn.Module]) -> None:
        """Every forward pass of a layer is progress, and in a timed step it is timed."""
        for layer in layers:
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave)

    def begin(self, step: int) -> None:
        """Step `step` (from 1) begins: now its data are waited for."""
        self._timing = step % EVERY == 0
        self._step, self._began, self._seconds = step, time.perf_counter(), 0.0

    def has_data(self) -> None:
        """The step's data are there."""
        self._seconds = time.perf_counter() - self._began

    def end(self) -> None:
        """The step has ended."""
        self._read()
        if not self._timing:
            return
        self._timing = False
        took = time.perf_counter() - self._began
        if self._events:  # the GPU may still be at it: read at the end of a later step
            self._unread = (self._step, self._seconds, took)
        else:
            self._tell(self._step, self._seconds, took)

    def _enter(self, *_: object) -> None:
        self.pulse.count += 1
        if self._timing:
            self._entered = self._now()

    def _leave(self, *_: object) -> None:
        if not self._timing or self._entered is None:
            return
        now = self._now()
        if self.device.type == "cuda":
            self._events.append((self._entered, now))
        else:
            self._seconds += now - self._entered
        self._entered = None

    def _now(self) -> Any:
        """Seconds, or an event in the GPU's stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # type: ignore[no-untyped-call]
        return event

    def _read(self) -> None:
        """Take the events of a timed step that has passed on the GPU."""
        if self._unread is None or not self._events[-1][1].query():
            return
        step, data, took = self._unread
        layers = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._events, self._unread = [], None
        self._tell(step, data + layers, took)

    def _tell(self, step: int, own: float, took: float) -> None:
        self._recent.append(own)
        self.pulse.own = (step, statistics.median(self._recent), took)


@dataclass(frozen=True)
class Straggler:
    """Ranks of one host that were slow in several comparisons."""

    ranks: tuple[int, ...]
    host: str
    ratio: float
    """The slowest one's own time over the median of its peers."""
    seconds: float
    """Its own work in a step."""
    median: float
    """Its peers' median."""
    step: int

    def __str__(self) -> str:
        """For the console."""
        verb = "is slow: its" if len(self.ranks) == 1 else "are slow: their"
        return (
            f"{ranks_named(self.ranks)} on {self.host} {verb} own work in a step takes {self.ratio:.2f} x the median "
            f"({self.seconds * 1e3:.3g} ms, others {self.median * 1e3:.3g} ms), {TIMES} times in a row"
        )


class Stragglers:
    """Rank 0: compares what all heartbeats carry. `compare` is the watchdog's thread's, `news` the main thread's."""

    def __init__(self, grid: Grid) -> None:
        self._stage = [grid.place(rank)["pipeline"] for rank in range(grid.world)]
        self._seen: dict[int, int] = {}
        self._slow: dict[int, int] = {}
        self._named: set[int] = set()
        self._news: deque[Straggler] = deque()

    def compare(self, beats: Mapping[int, Mapping[str, Any]]) -> None:
        """One comparison; `beats` are the last heartbeats by rank."""
        told = {rank: beat["own"] for rank, beat in beats.items() if beat.get("own")}
        fresh = {rank for rank, (step, *_) in told.items() if self._seen.get(rank) != step}
        found: dict[str, list[tuple[float, int, float]]] = {}
        for stage in set(self._stage):
            peers = {r: own for r, (_, own, _) in told.items() if self._stage[r] == stage}
            if len(peers) < 2:
                continue
            # The lower of two in the middle: of two ranks the faster one is the measure.
            median = statistics.median_low(peers.values())
            for rank in sorted(fresh & peers.keys()):
                if self._is_named(rank, peers[rank], median, told[rank][2]):
                    ratio = peers[rank] / max(median, 1e-9)
                    found.setdefault(beats[rank].get("host", "?"), []).append((ratio, rank, median))
        self._seen.update({rank: told[rank][0] for rank in fresh})
        for host, ranks in found.items():
            ratio, slowest, median = max(ranks)
            step, own, _ = told[slowest]
            names = tuple(rank for _, rank, _ in ranks)
            self._news.append(Straggler(names, host, ratio, own, median, step))

    def _is_named(self, rank: int, own: float, median: float, took: float) -> bool:
        """Count a comparison of one rank; whether it is to be named now. Once, until it has been as fast as others."""
        slow = own > RATIO * median and own - median > SHARE * took
        self._slow[rank] = self._slow.get(rank, 0) + 1 if slow else 0
        if not slow:
            self._named.discard(rank)
        if self._slow[rank] < TIMES or rank in self._named:
            return False
        self._named.add(rank)
        return True

    def news(self) -> list[Straggler]:
        """What was found since the last call."""
        found = []
        while self._news:
            found.append(self._news.popleft())
        return found
