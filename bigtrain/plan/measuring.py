"""One rank's training steps, watched: what they hold, do and send. On fake tensors in a dry run, on real ones in tests.

Both go through `measure`, so that a difference between them is one between fake and real tensors.
"""

from __future__ import annotations

import contextlib
import gc
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bigtrain.config import Config
from bigtrain.engine import Engine, make_engine
from bigtrain.errors import RunError
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.model.build import build_model
from bigtrain.parallel import pipeline
from bigtrain.parallel.schedule import Action
from bigtrain.plan.oplog import Item, OpLog, Work, sums
from bigtrain.plan.storages import Held, Places, Storages, gradients_of


@dataclass(frozen=True)
class Step:
    """One training step of one rank."""

    microbatches: int
    peak: int
    """Most bytes held at once."""
    held: list[Held]
    """What they were held for, the largest first."""
    work: Work
    """Sums over `log`."""
    log: array[int]
    """All work, in order; entries of `Measured.table`."""


@dataclass(frozen=True)
class Measured:
    """What a rank does, from its model's making on."""

    setup: int
    """Most bytes held while the engine was made."""
    static: int
    """Bytes held between steps."""
    steps: list[Step]
    table: list[Item]


def measure(config: Config, mesh: Mesh, counts: Sequence[int]) -> Measured:
    """Make this rank's model and engine and train, one step for each number of microbatches in `counts`.

    Collective. RunError when a step is skipped.
    """
    batches = [batch_of(config, number) for number in range(max(counts))]
    model = build_model(
        config.model,
        config.loss,
        kernels=config.layout.kernels,
        recompute=config.layout.recompute,
        device="meta",
        seed=config.train.seed,
    )
    places = Places()
    storages, log = Storages(places), OpLog(mesh, places, config.data.sequence_length)
    with places, storages, log, _actions_noted(log):
        engine = make_engine(model, config, mesh)
        setup = storages.peak
        try:
            with _kinds_known(engine, storages, places):
                steps = [_step(config, mesh, engine, batches[:count], storages, log) for count in counts]
            gc.collect()
            static = storages.live
        finally:
            engine.close()
    return Measured(setup, static, steps, list(log.table))


def _step(
    config: Config, mesh: Mesh, engine: Engine, batches: list[Batch], storages: Storages, log: OpLog
) -> Step:
    counted = len(batches) * config.train.microbatch * config.data.sequence_length * mesh.data_size
    with _no_garbage():
        storages.restart()
        log.restart()
        result = engine.train_step(batches, counted, 1e-5)
    if result.skipped:
        raise RunError(
            f"a step was skipped: loss {result.loss}, gradient norm {result.grad_norm}", where="measure"
        )
    for gradient in gradients_of(engine):
        storages.follow(gradient, "gradients")
    return Step(len(batches), storages.peak, storages.at_peak(), sums(log), log.work)


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Reference cycles are dropped before, and none by chance within: two runs hold the same at the same time."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def batch_of(config: Config, number: int) -> Batch:
    """A microbatch of random tokens. Every row is two documents, where documents are kept apart."""
    B, S = config.train.microbatch, config.data.sequence_length
    tokens, targets = (torch.randint(0, config.model.vocab_size, (B, S)) for _ in range(2))
    starts = None
    if config.data.document_mask:
        starts = (torch.arange(2 * B + 1) * S // 2).to(torch.int32)
    return Batch(tokens, targets, starts, torch.arange(number * B, (number + 1) * B))


@contextlib.contextmanager
def _kinds_known(engine: Any, storages: Storages, places: Places) -> Iterator[None]:
    """Tell the storages what they are held for: by what the engine says it holds, and as gradients come."""
    sharded = hasattr(engine, "records") and hasattr(engine, "engine")
    model = engine.engine.module if sharded else engine.model
    weights = list(model.parameters())
    places.names.update({id(module): name for name, module in model.named_modules() if name})
    for gradient in gradients_of(engine):
        storages.follow(gradient, "gradients")
    for piece in engine.pieces(owned=False):
        storages.follow(piece.tensor, "optimizer")
    for weight in weights:
        storages.follow(getattr(weight, "ds_tensor", weight), "weights")
        storages.follow(weight, "weights")

    def arrived(gradient: torch.Tensor | None) -> None:
        if gradient is not None:  # put off: see `bigtrain.parallel.region.Later`
            storages.follow(gradient, "gradients")

    def updating(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    storages.follow(parameter.grad, "gradients")

    hooks: list[Any] = [weight.register_hook(arrived) for weight in weights if weight.requires_grad]
    hooks.append(register_optimizer_step_pre_hook(updating))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _actions_noted(log: OpLog) -> Iterator[None]:
    """Write down where each action of a pipeline's schedule begins, and where the schedule ends."""
    forward, backward, walk = pipeline._Run._forward, pipeline._Run._backward, pipeline._Run.walk

    def noted_forward(run: Any, action: Action, chunk: Any) -> None:
        log.note_action(action)
        forward(run, action, chunk)

    def noted_backward(run: Any, action: Action) -> None:
        log.note_action(action)
        backward(run, action)

    def noted_walk(run: Any) -> torch.Tensor:
        weights = iter([a for a in run.plan[run.pipeline.mesh.pipeline.rank] if a.kind == "W"])
        run_jobs = pipeline.run_jobs  # type: ignore[attr-defined]

        def noted_jobs(jobs: Any) -> None:
            log.note_action(next(weights))
            run_jobs(jobs)

        with mock.patch.object(pipeline, "run_jobs", noted_jobs):
            found = walk(run)
        log.note_action(None)
        return found

    with (
        mock.patch.object(pipeline._Run, "_forward", noted_forward),
        mock.patch.object(pipeline._Run, "_backward", noted_backward),
        mock.patch.object(pipeline._Run, "walk", noted_walk),
    ):
        yield
