"""Save while training goes on: training stops only for the copy of its state into host memory.

    start   collective: end the save before, make the draft, copy this rank's pieces
    thread  write and sync this rank's file, hand its record to rank 0, whose thread commits when all have come
    news    rank 0: the checkpoint that was committed since it last asked
    failed  whether this rank's thread has failed; the trainer adds it up over the ranks in a sum it makes anyway
    settle  collective: wait for the save in flight; raises on every rank when one failed

At most one save is in flight. The ranks' threads speak through the store where the ranks met, never through the
process groups, whose collectives the training step issues in an order of its own.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.agree import together
from bigtrain.checkpoint.commit import abandon, commit
from bigtrain.checkpoint.format import ALIGNMENT, StoredFile
from bigtrain.checkpoint.store import Draft, begin_together, save
from bigtrain.checkpoint.writer import bytes_of, write_file
from bigtrain.errors import RunError
from bigtrain.logical import Piece
from bigtrain.mesh import COLLECTIVE_TIMEOUT, Mesh
from bigtrain.rollcall import ranks_named

_log = logging.getLogger(__name__)
_LINGER = 10.0
"""Seconds that rank 0 waits for the other ranks' files when the run is failing."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is committed and on the disk."""

    path: Path
    blocked: float
    """Seconds that training stood still."""
    seconds: float
    """From the start of the save to its commit."""


class Saver:
    """Saves of one run, in the background (`asynchronous`) or while training waits."""

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        *,
        asynchronous: bool = True,
        committed: Callable[[], object] = lambda: None,
    ) -> None:
        """`committed` is called on rank 0 after each commit (retention), in the background too."""
        self.root, self.mesh, self.asynchronous, self.committed = root, mesh, asynchronous, committed
        self._memory = HostMemory(mesh.device)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved: Saved | None = None
        self._leaving = threading.Event()
        # A connection of its own: a thread that waits for NCCL's set-up holds the common one.
        self._store: Any = mesh.store.clone() if mesh.world > 1 and mesh.store is not None else None

    def start(self, step: int, pieces: Iterable[Piece], state: dict[str, Any]) -> None:
        """Begin to save root/step_NNNNNNNN (collective); `state` (JSON-able) is rank 0's.

        The pieces of all ranks together must cover every element of every tensor once. They may change as soon
        as this returns. Raises RunError on every rank when the former save failed, or the disk is full.
        """
        began = time.perf_counter()
        self.settle()
        mine = list(pieces)
        copies = self._copies(step, mine) if self.asynchronous else []
        needed, impossible = self.mesh.sum([bytes_of(mine), copies is None])
        if not self.asynchronous or impossible:
            path = save(self.root, step, mine, state, self.mesh)
            self._end(path, began, time.perf_counter() - began)
            return
        draft = begin_together(self.root, step, int(needed), self.mesh)
        blocked = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._run,
            args=(draft, copies, state, began, blocked),
            name="bigtrain-save",
            daemon=True,  # a run that is told twice to stop leaves at once; the draft is nobody's then
        )
        self._thread.start()

    def _copies(self, step: int, pieces: Sequence[Piece]) -> list[Piece] | None:
        """The pieces in host memory; None where there is not enough of it."""
        try:
            return self._memory.copy(pieces)
        except (RuntimeError, MemoryError) as e:  # torch's allocator raises RuntimeError
            _log.warning(
                "step %d is saved while training waits: no host memory for a copy of %.1f MB (%s)",
                *(step, bytes_of(pieces) / 1e6, e),
            )
            return None

    def news(self) -> Saved | None:
        """Rank 0: what was committed since the last call."""
        saved, self._saved = self._saved, None
        return saved

    @property
    def failed(self) -> bool:
        """Whether this rank could not write, or rank 0 not commit; `settle` says why, on all ranks."""
        return self._failure is not None

    def settle(self) -> None:
        """Wait until nothing is in flight (collective). Raises RunError on every rank when one failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None

        def tell() -> None:
            if failure is not None:
                raise failure

        together(self.mesh, tell)

    def leave(self) -> None:
        """The run is failing: let a save in flight end if it still can. Not collective; never raises."""
        self._leaving.set()
        if self._thread is not None:
            self._thread.join(10 * _LINGER)

    def _run(
        self, draft: Draft, pieces: Sequence[Piece], state: dict[str, Any], began: float, blocked: float
    ) -> None:
        """Write, meet, commit; keep the failure for `settle`."""
        try:
            record: StoredFile | None = None
            try:
                record = write_file(draft.file, pieces, step=draft.step, rank=draft.rank)
            finally:
                # Without a record rank 0 knows that it waits in vain; this rank says why, to all.
                others = self._meet(f"save/{draft.path.name}", record)
            if self.mesh.first and all(others):
                files = [record, *(StoredFile(**other) for other in others if other)]
                commit(draft.path, draft.final, sorted(files, key=lambda f: f.rank), draft.step, state)
                self._end(draft.final, began, blocked)
        except BaseException as e:
            self._failure = e
        finally:
            if self.mesh.first:
                abandon(draft.path, draft.lock)

    def _end(self, path: Path, began: float, blocked: float) -> None:
        """Rank 0: a checkpoint is committed."""
        if self.mesh.first:
            self._saved = Saved(path, blocked, time.perf_counter() - began)
            self.committed()

    def _meet(self, key: str, record: StoredFile | None) -> list[dict[str, Any] | None]:
        """Hand the record of this rank's file to rank 0; on rank 0 those of the others. Raises RunError."""
        if self.mesh.first:
            return self._others(key)
        self._store.queue_push(key, json.dumps(record and asdict(record)))
        return []

    def _others(self, key: str) -> list[dict[str, Any] | None]:
        """What all other ranks handed over. Raises RunError naming those that did not."""
        found: list[dict[str, Any] | None] = []
        deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
        pause = 0.01
        while len(found) < self.mesh.world - 1:
            if self._store.queue_len(key):
                found.append(json.loads(self._store.queue_pop(key)))
                continue
            if self._leaving.is_set():
                deadline = min(deadline, time.monotonic() + _LINGER)
                self._leaving.clear()
            if time.monotonic() > deadline:
                came = {record["rank"] for record in found if record} | {0}
                missing = ranks_named(sorted(set(range(self.mesh.world)) - came))
                raise RunError(
                    f"nothing was saved: {missing} of {self.mesh.world} did not write in time",
                    where=str(self.root),
                    do="look at those ranks' logs and machines; the checkpoints before are intact",
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        return found


class HostMemory:
    """Host memory for a copy of this rank's state, kept from save to save: page faults cost more than the copy."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces in host memory, valid until the next call. Raises RuntimeError, MemoryError."""
        starts, end = [], 0
        for piece in pieces:
            starts.append(end)
            end += -(-piece.tensor.numel() * piece.tensor.element_size() // ALIGNMENT) * ALIGNMENT
        if self._buffer.numel() < end:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is asked for
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self.pinned)
        copies = []
        for piece, start in zip(pieces, starts, strict=True):
            source = piece.tensor.detach()
            size = source.numel() * source.element_size()
            target = self._buffer[start : start + size].view(source.dtype).view(source.shape)
            target.copy_(source, non_blocking=True)
            copies.append(Piece(piece.kind, piece.name, piece.shape, piece.offset, target))
        if self.pinned:
            torch.cuda.synchronize()
        return copies
