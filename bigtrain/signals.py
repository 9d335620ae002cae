"""Signals ask a run to stop: the handler only sets a flag, which all ranks agree on at the next safe point."""

from __future__ import annotations

import os
import signal
from types import FrameType

_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """Set by the first TERM, INT, USR1 or USR2; a second one leaves at once with exit code 128 + signal."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous = {s: signal.signal(s, self._handle) for s in _ASKING}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
