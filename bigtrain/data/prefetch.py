"""Read ahead in a background thread, without hanging or hiding an error."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_log = logging.getLogger(__name__)

CLOSING = 5.0
"""Seconds that `close` waits for a read that is under way; the thread is a daemon, which no exit waits for."""


class _End:
    """The last thing in the queue: why there is nothing more."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetch(Generic[T]):
    """An iterator over `items`, of which up to `depth` are made before they are asked for.

    An exception of `items` is raised to the consumer in its place. The thread ends with the items, on
    `close`, and when the Prefetch is garbage.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        """`depth` >= 1. The thread starts at once."""
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        self._head: list[T | _End] = []  # what `ready` has taken from the queue: at most one
        # The thread must not hold self, or a forgotten Prefetch would never be garbage.
        arguments = (items, self._queue, self._stop)
        self._thread = threading.Thread(target=_fill, args=arguments, name="bigtrain-data", daemon=True)
        weakref.finalize(self, self._stop.set)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        item = self._head.pop() if self._head else self._queue.get()
        if not isinstance(item, _End):
            return item
        self._ended = True
        self._thread.join()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def ready(self, seconds: float) -> bool:
        """Wait up to `seconds` for the next item, or the end; whether `next` returns at once."""
        if not self._head and not self._ended:
            with contextlib.suppress(queue.Empty):
                self._head.append(self._queue.get(timeout=seconds))
        return bool(self._head) or self._ended

    def close(self) -> None:
        """Stop the thread and wait for it: one item's work, and no longer than CLOSING where that hangs."""
        self._ended = True
        self._stop.set()
        self._thread.join(CLOSING)
        if self._thread.is_alive():
            _log.warning("the thread that reads data has not come back for %g s; left alone", CLOSING)


def _fill(items: Iterator[T], filled: queue.Queue[T | _End], stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not _put(filled, item, stop):
                return
    except BaseException as raised:
        error = raised
    _put(filled, _End(error), stop)


def _put(filled: queue.Queue[T | _End], item: T | _End, stop: threading.Event) -> bool:
    """Wait for room; False if the consumer has gone."""
    while not stop.is_set():
        try:
            filled.put(item, timeout=0.05)
        except queue.Full:
            continue
        return True
    return False
