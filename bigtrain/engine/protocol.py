"""What the trainer asks of an engine: gradients -> weights, whatever shards them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bigtrain.config import Config
from bigtrain.grid import grid_of
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.model.build import materialise
from bigtrain.model.init import initialise
from bigtrain.parallel.apply import lay

Refuse = Callable[[float, float], bool]
"""Whether a step of this (finite) loss and gradient norm is left out. The same answer on every rank."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same numbers on every rank."""

    loss: float
    """Mean plain cross-entropy over the counted tokens of the global batch, in nats."""
    grad_norm: float
    """Global norm of the gradient of the mean objective, before clipping; inf when it or the loss is not finite."""
    skipped: bool
    """Loss or gradient was not finite, or refused: no weight, no optimizer state, no count was changed."""
    loss_scale: float
    """What the loss of this step was multiplied by (1 except in fp16)."""


class Engine(Protocol):
    """Turns microbatches into updated weights. All ranks make the same calls in the same order."""

    def train_step(
        self, microbatches: Sequence[Batch], counted: int, lr: float, refuse: Refuse | None = None
    ) -> StepResult:
        """One update from this rank's microbatches (equally many on every rank).

        `counted` is the number of counted tokens in the global batch of all ranks, `lr` this step's rate. `refuse`
        is asked before the update, on every rank, from numbers that the step brings to the host anyway.
        """

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """This rank's part of the sum of plain cross-entropy in nats, without dropout or gradients.

        Summed over all ranks, every counted token of every data rank's `batches` comes once.
        """

    def pieces(self, owned: bool) -> Iterator[Piece]:
        """Views of the fp32 weights and the optimizer state as boxes of logical tensors.

        owned=True: over all ranks every element exactly once, for saving. owned=False: everything this rank
        holds, to be filled by loading; call `loaded` afterwards.
        """

    def extra_state(self) -> dict[str, Any]:
        """What else a checkpoint must hold, as JSON: count of updates, loss scaler."""

    def loaded(self, extra: dict[str, Any]) -> None:
        """Pieces were filled: refresh the weights that the model computes with, set the counters."""

    def close(self) -> None:
        """Free what the engine holds."""


def make_engine(model: torch.nn.Module, config: Config, mesh: Mesh) -> Engine:
    """The engine that `layout` names; auto is the reference on one process and ZeRO on several.

    `model` is whole and on the meta device; it becomes the engine's. It is laid over the mesh, and each rank
    fills its own part with initial values. Raises UserError for a layout that cannot work, naming the nearest
    one that does.
    """
    grid_of(config, mesh.world)
    name = engine_name(config, mesh.world)
    model = lay(model, config, mesh)
    if name == "zero" and config.layout.zero == 3:
        from bigtrain.engine.zero import ZeroEngine

        return ZeroEngine(model, config, mesh)  # it cuts every parameter as soon as it is filled
    materialise(model, mesh.device)
    initialise(model, config.model, config.train.seed)
    if name == "reference":
        from bigtrain.engine.reference import ReferenceEngine

        return ReferenceEngine(model, config)
    if config.layout.zero == 0:
        from bigtrain.engine.replica import ReplicaEngine

        return ReplicaEngine(model, config, mesh)
    from bigtrain.engine.zero import ZeroEngine

    return ZeroEngine(model, config, mesh)


def engine_name(config: Config, world: int) -> str:
    """ "reference" or "zero"."""
    chosen = config.layout.engine
    if chosen != "auto":
        return chosen
    return "reference" if world == 1 and config.layout.offload == "none" else "zero"
