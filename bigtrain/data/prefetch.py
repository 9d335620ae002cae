"""Read ahead in a background thread, without hanging or hiding an error."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


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
        item = self._queue.get()
        if not isinstance(item, _End):
            return item
        self._ended = True
        self._thread.join()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it (at most one item's work)."""
        self._ended = True
        self._stop.set()
        self._thread.join()


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
