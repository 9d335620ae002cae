"""Where records go: always a file, then TensorBoard, then Weights & Biases; a sink that fails never stops a
run."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from bigtrain.config import LogConfig
from bigtrain.errors import UserError
from bigtrain.metrics import Record, to_json

_LOGGER = logging.getLogger(__name__)
_SYNC_SECONDS = 30.0
_MOST_WAITING = 64 << 20
"""Bytes, of about 150,000 steps."""


class Sink(Protocol):
    """Takes records; whatever it raises makes it the last time it is asked."""

    def write(self, record: Record) -> None:
        """Take one record, without delay."""

    def flush(self) -> None:
        """Make what was taken safe; called before a checkpoint is saved."""

    def close(self) -> None:
        """Flush and stop."""


class Sinks:
    """Fans out to several sinks. One that fails is dropped with one warning; the run goes on."""

    def __init__(self, sinks: list[Sink], warn: Callable[[str], None]) -> None:
        self._sinks = sinks
        self._warn = warn

    def write(self, record: Record) -> None:
        """Give a record to every sink that still works."""
        self._each(lambda sink: sink.write(record))

    def flush(self) -> None:
        """Make everything safe: a checkpoint is about to say that it was recorded."""
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except Exception as e:
                self._sinks.remove(sink)
                self._warn(
                    f"{type(sink).__name__} failed and is left out from now on: {type(e).__name__}: {e}"
                )


def check_sinks(config: LogConfig) -> None:
    """UserError when [log] asks for a package that is not installed; on every rank, before anything starts."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "log.wandb is set, but the package wandb is not installed",
            where="log.wandb",
            do="pip install 'bigtrain[wandb]', or remove the key",
        )


def open_sinks(config: LogConfig, run: Path, name: str, *, step: int, warn: Callable[[str], None]) -> Sinks:
    """The sinks that [log] asks for, going on after `step`. See `check_sinks`."""
    sinks: list[Sink] = [JsonlSink(run / "metrics.jsonl", warn)]
    if config.tensorboard:
        sinks.append(TensorBoardSink(run / "tensorboard", step))
    if config.wandb:
        try:
            sinks.append(WandbSink(config.wandb, name, run))
        except Exception as e:  # no network, no login: that is no reason not to train
            warn(f"Weights & Biases did not start and is left out: {type(e).__name__}: {e}")
    return Sinks(sinks, warn)


class JsonlSink:
    """One JSON line a record. Each is handed to the system at once, so a killed process loses none.

    Lines that a full disk does not take wait in memory, and are written when there is room again.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = _LOGGER.warning) -> None:
        self._path, self._warn = path, warn
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._synced = time.monotonic()

    def write(self, record: Record) -> None:
        """Append a line; every 30 s wait until it is on the disk."""
        before = len(self._waiting)
        self._waiting += to_json(record).encode()
        try:
            self._drain()
        except OSError as e:
            if not before:
                self._warn(f"{self._path}: {e.strerror}; its lines wait in memory")
            if len(self._waiting) > _MOST_WAITING:
                raise
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until everything that the disk takes is on it."""
        with contextlib.suppress(OSError):
            self._drain()
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _drain(self) -> None:
        """A full disk may take a part of a line: the rest of it comes next."""
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def close(self) -> None:
        """Flush and close. Raises OSError when lines are lost."""
        self.flush()
        self._drain()
        self._file.close()


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """(name, value) of a record's finite numbers: train/loss, eval/bits_per_byte; none of an event."""
    if record.kind == "event":
        return
    group = "eval" if record.kind == "eval" else "train"
    for key, value in asdict(record).items():
        if key in ("kind", "step", "time") or not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        yield f"{group}/{key}", float(value)


class TensorBoardSink:
    """Event files under `folder`, written by a thread that starts with the first record.

    Importing TensorBoard takes a second: the thread keeps that out of the time to the first step.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Events after `step` that a former attempt wrote are hidden (they will be made again)."""
        self._folder = folder
        self._purge = step + 1
        self._records: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def write(self, record: Record) -> None:
        """Queue a record; raises what the thread met."""
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
            self._thread.start()
        self._records.put(record)

    def flush(self) -> None:
        """Nothing to wait for: metrics.jsonl is the record, these files are a view of it."""

    def close(self) -> None:
        """Write what is queued."""
        if self._thread is not None:
            self._records.put(None)
            self._thread.join(timeout=30)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self._folder), purge_step=self._purge, flush_secs=20) as writer:
                while (record := self._records.get()) is not None:
                    for name, value in scalars(record):
                        writer.add_scalar(name, value, record.step, walltime=record.time)
        except Exception as e:
            self._error = e


class WandbSink:
    """A Weights & Biases run, the same one again when a run resumes."""

    def __init__(self, project: str, name: str, run: Path) -> None:
        """Raises wandb's own errors when it cannot start."""
        import wandb

        identity = run / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self._run: Any = wandb.init(
            project=project, name=name, dir=str(run), id=identity.read_text().strip(), resume="allow"
        )
        # Steps made again after a resume are lower than the last one sent, which wandb's own counter forbids.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Send the numbers of a record (wandb queues them in its own process)."""
        if numbers := dict(scalars(record)):
            self._run.log({"step": record.step, **numbers})

    def flush(self) -> None:
        """Nothing to wait for: metrics.jsonl is the record, this is a view of it."""

    def close(self) -> None:
        """Wait until everything was sent."""
        self._run.finish()
