"""Who prepares: this process alone, processes of this machine, or the ranks of an MPI job. Same units, same shards.

Nobody collects tokens: every worker writes the shards of its own units, and the manifest is made from their records.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from bigtrain.data.documents import Report
from bigtrain.data.duplicates import sign_unit
from bigtrain.data.encoders import use
from bigtrain.data.manifest import TOKENIZER
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.unit_work import do_unit, done_before
from bigtrain.data.units import Unit
from bigtrain.data.work import Work
from bigtrain.errors import BigtrainError, RunError, UserError
from bigtrain.place import discover

T = TypeVar("T")
Job = Literal["sign", "encode"]
"""Write the signs of a unit's documents, from which duplicates are found, or its shards."""
Tell = Callable[[int, int, int], None]
"""Hears bytes read, documents and tokens so far, of all workers that this process knows of."""


class Alone:
    """One process does every unit; the encoder's threads use all cores."""

    leads = True
    threads = -1

    def share(self, make: Callable[[], T]) -> T:
        """What the one who leads makes, for everyone."""
        return make()

    def do(self, job: Job, work: Work, units: Sequence[Unit], tell: Tell) -> None:
        """Every unit that is not done. Raises what its work raises."""
        do_units(job, work, units, tokenizer_of(work), self.threads, tell)


def tokenizer_of(work: Work) -> Tokenizer:
    """The corpus's tokenizer, with the encoder that was chosen."""
    tokenizer = Tokenizer.load(work.out / TOKENIZER)
    use(tokenizer, work.encoder)
    return tokenizer


def do_units(
    job: Job, work: Work, units: Sequence[Unit], tokenizer: Tokenizer, threads: int, tell: Tell
) -> None:
    """Every unit that is not done, in this process with `threads` of the encoder."""
    behind = (0, 0, 0)

    def tell_more(report: Report, tokens: int) -> None:
        tell(behind[0] + report.position, behind[1] + report.documents, behind[2] + tokens)

    for unit in units:
        if job == "sign":
            documents, tokens = sign_unit(work, unit, tell_more), 0
        else:
            done = done_before(work, unit.number) or do_unit(work, unit, tokenizer, threads, tell_more)
            documents, tokens = done.report.documents, done.tokens
        behind = (behind[0] + unit.size, behind[1] + documents, behind[2] + tokens)
        tell(*behind)


class Processes(Alone):
    """Worker processes of this machine, each with one thread; this process only watches them."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def do(self, job: Job, work: Work, units: Sequence[Unit], tell: Tell) -> None:
        """As Alone.do. RunError if a worker is killed: what was finished stays."""
        # Spawned, not forked: a fork copies locks that threads of this process may hold.
        context = multiprocessing.get_context("spawn")
        # Without locks: a worker that is killed while it holds one would keep it.
        counts = context.RawArray("Q", 3 * self.workers)
        pool = ProcessPoolExecutor(self.workers, context, _begin, (job, work, counts, os.getpid()))
        try:
            waiting = {pool.submit(_do_one, unit) for unit in units}
            while waiting:
                ended, waiting = wait(waiting, 0.2, FIRST_COMPLETED)
                for each in ended:
                    each.result()
                tell(*(sum(counts[i::3]) for i in range(3)))
        except BrokenProcessPool as e:
            raise RunError(
                "a worker was killed",
                where=str(work.out),
                do="run the same command again: finished units are kept; if memory ran out, with fewer --workers",
            ) from e
        finally:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


_HERE: dict[str, Any] = {}
"""What a worker process of `Processes` knows."""


def _begin(job: Job, work: Work, counts: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who watches ends the workers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a worker ends with its parent
        if os.getppid() != parent:  # which has ended before
            os._exit(1)
    number = multiprocessing.current_process()._identity[0]  # consecutive, for the workers of a pool
    place = number % (len(counts) // 3)
    tokenizer = tokenizer_of(work)
    _HERE.update(job=job, work=work, counts=counts, place=place, before=[0, 0, 0], tokenizer=tokenizer)


def _do_one(unit: Unit) -> None:
    place, before, last = 3 * _HERE["place"], _HERE["before"], [0, 0, 0]

    def tell(*now: int) -> None:
        last[:] = now
        for i in range(3):
            _HERE["counts"][place + i] = before[i] + now[i]

    do_units(_HERE["job"], _HERE["work"], [unit], _HERE["tokenizer"], 1, tell)
    _HERE["before"] = [a + b for a, b in zip(before, last, strict=True)]


class Ranks(Alone):
    """The ranks of an MPI job: every rank takes each size-th unit; rank 0 leads."""

    threads = 1

    def __init__(self) -> None:
        """UserError if mpi4py is not installed, or sees another job than the launcher's."""
        place = discover()
        try:
            from mpi4py import MPI
        except ImportError as e:
            raise UserError(
                f"{place.launcher} started {place.world} ranks, and mpi4py is not installed here",
                do='pip install "bigtrain[mpi]", or start one process with --workers',
            ) from e
        self._comm = MPI.COMM_WORLD
        if self._comm.Get_size() != place.world:
            raise UserError(
                f"{place.launcher} says that there are {place.world} ranks, MPI knows of {self._comm.Get_size()}",
                do="start with the mpirun of the MPI that mpi4py was built for, or one process with --workers",
            )
        self.leads = self._comm.Get_rank() == 0

    def share(self, make: Callable[[], T]) -> T:
        """As Alone.share; everyone raises what it raises."""
        made: tuple[T | None, BigtrainError | None] = (None, None)
        if self.leads:
            try:
                made = make(), None
            except BigtrainError as e:
                made = None, e
        result, error = self._comm.bcast(made)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def do(self, job: Job, work: Work, units: Sequence[Unit], tell: Tell) -> None:
        """As Alone.do, together: everyone raises the first rank's error when all are through."""
        rank, size = self._comm.Get_rank(), self._comm.Get_size()
        mine = units[rank::size]
        ahead = sum(unit.size for unit in units) / max(sum(unit.size for unit in mine), 1)

        def tell_all(*now: int) -> None:  # the others are about as far
            tell(*(round(ahead * count) for count in now))

        error: BigtrainError | None = None
        try:
            super().do(job, work, mine, tell_all)
        except BigtrainError as e:
            error = e
        for found in self._comm.allgather(error):
            if found is not None:
                raise found


def crew(workers: int, units: int) -> Alone:
    """Who prepares here: the ranks of an MPI job, else `workers` processes (0: one a core).

    UserError: the launcher is not one of MPI's.
    """
    place = discover()
    if place.world > 1:
        if place.launcher == "torchrun":
            raise UserError(
                f"torchrun started {place.world} processes", do="use mpirun, or one process with --workers"
            )
        return Ranks()
    count = min(workers or len(os.sched_getaffinity(0)), units)
    return Processes(count) if count > 1 else Alone()
