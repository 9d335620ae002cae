"""What the trainer asks of an engine: gradients -> weights, whatever shards them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bigtrain.config import Config
from bigtrain.errors import UserError
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same numbers on every rank."""

    loss: float
    """Mean plain cross-entropy over the counted tokens of the global batch, in nats."""
    grad_norm: float
    """Global norm of the gradient of the mean objective, before clipping; inf when the step was skipped."""
    skipped: bool
    """Loss or gradient was not finite: no weight, no optimizer state, no count was changed."""
    loss_scale: float
    """What the loss of this step was multiplied by (1 except in fp16)."""


class Engine(Protocol):
    """Turns microbatches into updated weights. All ranks make the same calls in the same order."""

    def train_step(self, microbatches: Sequence[Batch], counted: int, lr: float) -> StepResult:
        """One update from this rank's microbatches (equally many on every rank).

        `counted` is the number of counted tokens in the global batch of all ranks, `lr` this step's rate.
        """

    def eval_step(self, batch: Batch) -> float:
        """This rank's sum of plain cross-entropy in nats, without dropout or gradients."""

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


def build_device(config: Config, mesh: Mesh) -> torch.device:
    """Where to build the model that `make_engine` gets: "meta" where the engine fills and cuts it itself."""
    cut = engine_name(config, mesh.world) == "zero" and config.layout.zero == 3
    return torch.device("meta") if cut else mesh.device


def make_engine(model: torch.nn.Module, config: Config, mesh: Mesh) -> Engine:
    """The engine that `layout` names; auto is the reference on one process and ZeRO on several.

    `model` is whole, fp32, on `build_device`, or on the mesh's device (then ZeRO-3 cuts it afterwards), and
    becomes the engine's. Raises UserError for a layout that cannot work, naming the nearest one that does.
    """
    name = engine_name(config, mesh.world)
    check_engine(config, name, mesh.world)
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


def check_engine(config: Config, name: str, world: int) -> None:
    """UserError unless engine `name` can run this config on `world` ranks."""
    layout = config.layout
    if name == "reference":
        if world > 1:
            raise UserError(
                f"the reference engine runs in one process, not {world}",
                where="layout.engine",
                do='use engine = "auto", or start one process',
            )
        return
    if config.optim.kind == "muon" and layout.zero > 0:
        raise UserError(
            f"muon needs whole matrices, and ZeRO {layout.zero} cuts them into flat partitions",
            where="optim.kind",
            do='use layout.zero = 0, or optim.kind = "adamw"',
        )
    if config.model.kind == "lstm" and layout.zero == 3:
        # It calls its layers once a document segment, so not equally often on all ranks, and ZeRO-3 gathers
        # weights at every call.
        raise UserError(
            "the lstm calls its layers a different number of times on each rank, so ZeRO 3 cannot gather them",
            where="layout.zero",
            do="use layout.zero = 2",
        )
    if layout.offload == "optimizer" and layout.zero == 0:
        raise UserError(
            "ZeRO 0 keeps the optimizer state where the weights are",
            where="layout.offload",
            do='use layout.zero = 1, or offload = "none"',
        )
