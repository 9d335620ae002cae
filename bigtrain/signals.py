"""Signals ask a run to stop: they only set a flag, which all ranks agree on at the next safe point."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


PASSED_ON_SECONDS = 5.0
"""How long after a signal another one is the same request. SLURM signals every process of a step, and torchrun passes
its own signal on to the ranks: they hear of one `scancel --signal` twice, 1 ms apart where cores are free."""


class StopFlag:
    """Set by the first TERM, INT, USR1 or USR2; a later one leaves at once with exit code 128 + signal.

    Under a launcher "later" means PASSED_ON_SECONDS. Python runs a handler when its main thread is back from C, which
    one that waits in a collective for a rank without data is not. So a thread hears of every signal too, by the pipe
    that Python's own C handler writes to.
    """

    def __init__(self, passed_on_seconds: float = 0.0) -> None:
        self.signal_name: str | None = None
        self.elsewhere = False
        """Whether another rank was asked: the talk among ranks sets it (`bigtrain.heartbeat`)."""
        self.heard: Callable[[], None] = lambda: None
        """Called by a thread of this flag after the first signal."""
        self._passed_on_seconds = passed_on_seconds
        self._first: float | None = None
        self._pipe, into = os.pipe()
        os.set_blocking(into, False)
        self._into = into
        self._thread = threading.Thread(target=self._listen, name="bigtrain-signals", daemon=True)
        self._thread.start()
        self._former = signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        self._previous = {s: signal.signal(s, self._handle) for s in _ASKING}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name

    def _listen(self) -> None:
        while numbers := os.read(self._pipe, 64):
            for number in numbers:
                if number in _ASKING:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            self.signal_name = self.signal_name or signal.Signals(number).name
            self.heard()
        elif now - self._first >= self._passed_on_seconds:
            os._exit(128 + number)

    @property
    def anywhere(self) -> bool:
        """Whether this rank or, as far as it has heard, another one was asked."""
        return bool(self) or self.elsewhere

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former)
        os.close(self._into)
        self._thread.join()
        os.close(self._pipe)
