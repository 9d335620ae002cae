"""The assembly: config -> mesh -> data -> model -> engine -> trainer. One screen shows the whole run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from bigtrain.budget import BatchSchedule, LeftOut, Progress, rank_samples, sample_id
from bigtrain.checkpoint.agree import together
from bigtrain.config import Config
from bigtrain.configfile import render
from bigtrain.console import Startup
from bigtrain.data.corpus import Corpus, verify
from bigtrain.data.loader import Loader
from bigtrain.data.samples import Samples
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.engine import Engine, make_engine
from bigtrain.engine.reference import DTYPES
from bigtrain.errors import BigtrainError, UserError
from bigtrain.grid import grid_of
from bigtrain.heartbeat import Pulse
from bigtrain.lastwords import leave_word, lost_connection
from bigtrain.mesh import Mesh, rendezvous
from bigtrain.model.batch import Batch
from bigtrain.model.build import build_model
from bigtrain.model.kernel_check import check_kernels
from bigtrain.optim import learning_rate
from bigtrain.place import discover
from bigtrain.plan.scaling import peak_learning_rate
from bigtrain.recorder import Recorder
from bigtrain.rollcall import code_digest
from bigtrain.run_data import check_limits, held_out_samples, samples_of
from bigtrain.rundir import RunDir
from bigtrain.signals import PASSED_ON_SECONDS, StopFlag
from bigtrain.sinks import check_sinks
from bigtrain.stragglers import OwnTime, Stragglers
from bigtrain.trainer import Trainer
from bigtrain.watchdog import Watchdog, crash_stacks

VERIFIED_TOKENS = 2**28
"""Corpora up to this size are verified before training: at most 1 GB, read at 2 GB/s."""


@dataclass
class Parts:
    """A run's parts, put together and at step 0."""

    config: Config
    mesh: Mesh
    samples: Samples
    tokenizer: Tokenizer
    loader: Loader
    held_out: list[Batch]
    """This rank's held-out microbatches; empty when the dataset has no held-out token."""
    engine: Engine
    schedule: BatchSchedule
    clock: OwnTime
    """Knows of every forward pass of this rank's layers."""

    def steps(self, progress: Progress, total_steps: int, left_out: LeftOut = ()) -> Iterator[list[Batch]]:
        """This rank's microbatches of every step left, read ahead in the background; `left_out` is not read."""
        plan = rank_samples(
            self.schedule,
            progress,
            total_steps,
            microbatch=self.config.train.microbatch,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data_size,
            left_out=left_out,
        )
        return self.loader.stream(plan)

    def close(self) -> None:
        """Stop the reader thread and free the engine."""
        self.loader.close()
        self.engine.close()


def assemble(config: Config, mesh: Mesh, pulse: Pulse | None = None) -> Parts:
    """Build everything a run needs. Raises UserError for whatever does not fit together.

    `pulse` is told of progress.
    """
    torch.set_num_threads(config.layout.threads or _default_threads(mesh))
    check_sinks(config.log)
    samples = samples_of(config)
    for corpus in samples.corpora:
        _verify_small(corpus, mesh)
    tokenizer = Tokenizer.load(samples.corpora[0].tokenizer_path)
    loader = loader_of(config, samples, tokenizer)
    held_out = held_out_of(config, tokenizer, mesh)
    check_kernels(
        config.layout.kernels, config.model, config.loss, DTYPES[config.train.precision], mesh.device
    )
    model = build_model(
        config.model,
        config.loss,
        kernels=config.layout.kernels,
        recompute=config.layout.recompute,
        device="meta",
        seed=config.train.seed,
    )
    layers = list(model.layers)
    engine = make_engine(model, config, mesh)
    clock = OwnTime(pulse or Pulse(), mesh.device)
    clock.follow(
        layers
    )  # after the engine's hooks: a layer whose weights are being gathered waits for others
    return Parts(config, mesh, samples, tokenizer, loader, held_out, engine, BatchSchedule.of(config), clock)


def _verify_small(corpus: Corpus, mesh: Mesh) -> None:
    """Compare the checksums of a corpus that is read in a second; larger ones by `bigtrain inspect --verify`.

    Raises UserError on every rank when a shard was altered. A plain Megatron corpus has no checksums, and
    copies from a store are compared when they are made.
    """
    folder = corpus.folder
    if folder is not None and corpus.copies is None and corpus.num_tokens <= VERIFIED_TOKENS:
        together(mesh, lambda: verify(folder) if mesh.first else 0)


def _default_threads(mesh: Mesh) -> int:
    """OMP_NUM_THREADS where a person set it (torchrun sets it to 1 for everyone), else an equal share."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if mesh.world == 1 and wanted.isdigit():
        return max(1, int(wanted))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // mesh.place.local_world)


def loader_of(config: Config, samples: Samples, tokenizer: Tokenizer) -> Loader:
    """The loader that a config asks for over samples of one split."""
    return Loader(
        samples,
        seed=config.train.seed,
        document_mask=config.data.document_mask,
        objective=config.model.objective,
        mask_rate=config.loss.mask_rate,
        mask_id=tokenizer.mask_id,
        vocab_size=config.model.vocab_size,
        prefetch=config.data.prefetch,
    )


def held_out_of(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> list[Batch]:
    """This rank's share of the held-out sequences, the same ones at every evaluation."""
    samples = held_out_samples(config)
    if samples is None:
        return []
    loader = loader_of(config, samples, tokenizer)
    count, rows = config.train.eval_sequences, config.train.microbatch
    return list(loader.validation_batches(count, rows, rank=mesh.data_rank, ranks=mesh.data_size))


def join(config: Config) -> Mesh:
    """Meet the other ranks on the grid that the layout asks for.

    Raises UserError on every rank, before they meet, when the layout does not fit their number, and when they
    were started with another config or other code; RunError naming the ranks that did not come within
    BIGTRAIN_MEET_MINUTES.
    """
    place = discover()
    grid = grid_of(config, place.world)
    facts = {"config": render(config), "code": code_digest(), "torch": str(torch.__version__)}
    return rendezvous(grid, place=place, facts=facts, timeout_minutes=_meet_minutes())


def _meet_minutes() -> float:
    """BIGTRAIN_MEET_MINUTES, 10 when it is not set. Raises UserError unless it is above 0 and a week at most."""
    given = os.environ.get("BIGTRAIN_MEET_MINUTES", "10")
    # torch counts milliseconds in 32 bits: 24 days and more overflow.
    with contextlib.suppress(ValueError):
        if 0 < (minutes := float(given)) <= 10_080:
            return minutes
    raise UserError(
        f"{given!r} is no number of minutes above 0 and up to 10080 (a week)",
        where="BIGTRAIN_MEET_MINUTES",
        do="set it to how long the ranks may wait for each other at the start, or unset it for 10 minutes",
    )


@contextlib.contextmanager
def one_cause(mesh: Mesh, dog: Watchdog | None = None) -> Iterator[None]:
    """Leave word for the other ranks when this one fails; name the rank that failed first when it was another."""
    try:
        yield
    except BaseException as e:
        lost = lost_connection(e, mesh.store, mesh.rank, dog.ask if dog else None) if mesh.world > 1 else None
        if lost is not None:
            raise lost from e
        if mesh.world > 1:
            leave_word(
                mesh.store, mesh.rank, str(e) if isinstance(e, BigtrainError) else f"{type(e).__name__}: {e}"
            )
        raise


def train(config: Config, run: str | Path, *, fresh: bool = False, began: float | None = None) -> int:
    """Train to the end, or until a signal asks to stop. Returns the exit code 0 (done or preempted).

    Resumes from the newest sound checkpoint in the run directory. Raises UserError before anything is
    changed, RunError when the run fails; outcome.json then says so. `began` (seconds since 1970) is where the
    start-up time is counted from, by default the start of this process.
    """
    startup = Startup(began)
    startup.done("imports")
    with contextlib.ExitStack() as stack:
        stop = StopFlag(PASSED_ON_SECONDS if discover().launcher != "single" else 0.0)
        stack.callback(stop.close)
        dog = Watchdog()
        dog.share(stop)
        stack.callback(dog.close)
        mesh = join(config)
        stack.callback(mesh.close)
        dog.watch(mesh)
        stack.callback(dog.leave)
        stack.enter_context(one_cause(mesh, dog))
        parts = assemble(config, mesh, dog.pulse)
        stack.callback(parts.close)
        startup.done("model and data")
        run_dir = RunDir.open(
            run, config, fresh=fresh, mesh=mesh, data=parts.samples.corpora[0].manifest_hash
        )
        stack.callback(run_dir.close)
        stack.callback(crash_stacks(run_dir.logs, mesh.rank))
        recorder = Recorder(parts, run_dir, startup)
        dog.log_to(run_dir.logs, recorder.abandon)
        if mesh.first and mesh.world > 1:
            recorder.stragglers = Stragglers(mesh.grid)
            dog.compare = recorder.stragglers.compare
        _run(parts, recorder, stop)
    return 0


def _run(parts: Parts, recorder: Recorder, stop: StopFlag) -> None:
    """Resume, train, and write how it ended. After a rollback it trains on as a resumed run does."""
    try:
        recorder.resume()
        state = _train_on(parts, recorder, stop)
        while state == "rolled back":
            state = _train_on(parts, recorder, stop)
        parts.clock.pulse.mark("ending")
        asked = parts.mesh.gather(stop.signal_name) if state == "preempted" else []
        reason = ", ".join(sorted({str(name) for name in asked if name}))
        recorder.finish(state, recorder.progress, reason)
    except BaseException as e:
        recorder.fail(str(e) if isinstance(e, BigtrainError) else f"{type(e).__name__}: {e}")
        raise
    recorder.tell(state)


def _train_on(
    parts: Parts, recorder: Recorder, stop: StopFlag
) -> Literal["done", "preempted", "rolled back"]:
    """Train from where the recorder stands."""
    progress = recorder.progress
    left_out = recorder.guard.left_out
    total = parts.schedule.total_steps(parts.config, progress, left_out)
    end = parts.schedule.ahead(progress, total, left_out)
    if problem := parts.schedule.length_problem(progress, total, left_out):
        raise UserError(problem)
    check_limits(parts.config, parts.samples, sample_id(max(end.samples, 1) - 1, left_out))
    peak = peak_learning_rate(parts.config, end.tokens)
    recorder.begin(progress, end, peak)
    if progress.step >= total:
        return "done"
    trainer = Trainer(
        config=parts.config,
        mesh=parts.mesh,
        engine=parts.engine,
        observer=recorder,
        schedule=parts.schedule,
        learning_rate=partial(_rate, parts.config, peak.value, total),
        total_steps=total,
        progress=progress,
        held_out_batches=parts.held_out,
        token_bytes=parts.tokenizer.token_bytes(),
        stop=stop,
        guard=recorder.guard,
        resumed=recorder.resumed,
        clock=parts.clock,
    )
    return trainer.run(parts.steps(progress, total, left_out))


def _rate(config: Config, peak: float, total_steps: int, step: int) -> float:
    return learning_rate(config.optim, peak, step, total_steps)
