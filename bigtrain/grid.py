"""The sizes of the mesh axes for a config and a number of ranks, checked before any rank meets another.

Pure arithmetic: the planner, `--dry` and every rank of a run get the same answer, or the same refusal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bigtrain.budget import BatchSchedule, batch_problem
from bigtrain.config import Config
from bigtrain.errors import UserError

AXES = ("pipeline", "data", "context", "expert", "tensor")
"""From the slowest to the fastest: neighbouring ranks, inside one node, share tensors."""


@dataclass(frozen=True)
class Grid:
    """Ranks on each axis. Rank = (((pipeline x data) x context) x expert) x tensor, the last one fastest."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1
    shared_heads: int = 1
    """Consecutive tensor ranks that hold the same key/value head (tensor / kv_heads where that is above 1)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return (self.pipeline, self.data, self.context, self.expert, self.tensor)

    @property
    def world(self) -> int:
        """All ranks."""
        return math.prod(self.sizes)

    def place(self, rank: int) -> dict[str, int]:
        """A rank's coordinate on every axis."""
        found: dict[str, int] = {}
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank, found[axis] = divmod(rank, size)
        return found

    def ranks(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` only on these axes, itself included, in rising order."""
        here = self.place(rank)
        found, stride = [rank], 1
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            if axis in axes:
                found = [r + (i - here[axis]) * stride for i in range(size) for r in found]
            stride *= size
        return tuple(sorted(found))

    def __str__(self) -> str:
        """The axes above 1: "pipeline 2 x tensor 4"; "data 1" when there is none."""
        named = [f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(named) or "data 1"


def grid_of(config: Config, world: int) -> Grid:
    """The grid that [layout] makes of `world` ranks; one process alone is a grid of 1.

    Raises one UserError that lists whatever keeps this config from running on so many ranks.
    """
    found = list(world_problems(config, world))
    if found:
        word = "problem" if len(found) == 1 else "problems"
        raise UserError(f"{len(found)} {word} with this layout on {world} ranks\n  " + "\n  ".join(found))
    if world == 1:
        return Grid()
    layout = config.layout
    kv = config.model.num_kv_heads if config.model.kind == "transformer" else 1
    return Grid(
        pipeline=layout.pipeline,
        data=world // model_ranks(config),
        context=layout.context,
        expert=layout.expert,
        tensor=layout.tensor,
        shared_heads=max(1, layout.tensor // kv),
    )


def model_ranks(config: Config) -> int:
    """Ranks that one global batch needs at least: all axes but data."""
    layout = config.layout
    return layout.pipeline * layout.context * layout.expert * layout.tensor


def world_problems(config: Config, world: int) -> Iterator[str]:
    """Every reason why this config cannot run on `world` ranks, each with the nearest that can."""
    layout = config.layout
    if layout.engine == "reference" and world > 1:
        yield 'layout.engine: the reference engine runs in one process; use engine = "auto", or start one'
    if world > 1:
        yield from _axes_problems(config, world)
    elif problem := batch_problem(BatchSchedule.of(config), config.train.microbatch, 1):
        yield problem
    yield from _engine_problems(config, world)


def _axes_problems(config: Config, world: int) -> Iterator[str]:
    """Ranks, batch and sequence against the axes."""
    layout, each = config.layout, model_ranks(config)
    if world % each:
        below = max(1, world // each) * each
        yield (
            f"layout: pipeline {layout.pipeline} x context {layout.context} x expert {layout.expert} x tensor "
            f"{layout.tensor} = {each} does not divide {world} ranks; start {below} or {below + each} ranks"
        )
    elif problem := batch_problem(BatchSchedule.of(config), config.train.microbatch, world // each):
        yield problem
    for S in config.data.lengths.values():
        yield from _length_problems(config, S)


def _length_problems(config: Config, S: int) -> Iterator[str]:
    """A sequence length against the axes that cut sequences."""
    layout = config.layout
    pieces = layout.context * (2 if layout.context_by == "gather" else 1)
    if layout.context > 1 and S % pieces:
        yield (
            f"data.sequence_length: {S} does not divide into {pieces} pieces for context {layout.context}; "
            f"nearest that works: {max(1, round(S / pieces)) * pieces}"
        )
    elif layout.tensor > 1 and layout.sequence:
        tokens = config.train.microbatch * S // layout.context
        if tokens % layout.tensor:
            yield (
                f"layout.sequence: a microbatch of {tokens} tokens a rank does not divide among {layout.tensor} "
                f"tensor ranks; set sequence = false, or data.sequence_length to a multiple of "
                f"{layout.tensor * pieces}"
            )


def _engine_problems(config: Config, world: int) -> Iterator[str]:
    """What ZeRO and the optimizers cannot do together."""
    layout = config.layout
    sharded = layout.engine == "zero" or world > 1 or layout.offload != "none"
    if not sharded or layout.engine == "reference":
        return
    if config.optim.kind == "muon" and layout.zero > 0:
        yield (
            f"optim.kind: muon needs whole matrices, and ZeRO {layout.zero} cuts them into flat partitions; "
            'use layout.zero = 0, or optim.kind = "adamw"'
        )
    elif config.optim.kind == "muon" and layout.tensor > 1 and world > 1:
        yield (
            f"optim.kind: muon needs whole matrices, and tensor = {layout.tensor} cuts them; "
            'use layout.tensor = 1, or optim.kind = "adamw"'
        )
    if config.model.kind == "lstm" and layout.zero == 3:
        # It calls its layers once a document segment, so not equally often on all ranks, and ZeRO-3 gathers
        # weights at every call.
        yield (
            "layout.zero: the lstm calls its layers a different number of times on each rank, so ZeRO 3 cannot "
            "gather them; use layout.zero = 2"
        )
    if layout.offload == "optimizer" and layout.zero == 0:
        yield (
            "layout.offload: ZeRO 0 keeps the optimizer state where the weights are; use layout.zero = 1, "
            'or offload = "none"'
        )


def layout_notes(config: Config, world: int) -> list[str]:
    """What of [layout] works otherwise than it reads, as sentences for the user."""
    layout, notes = config.layout, []
    if world == 1 and (ranks := model_ranks(config)) > 1:
        notes.append(
            f"one process: the axes of [layout] are not used (they need {ranks} ranks or a multiple)"
        )
    elif layout.pipeline > 1 and layout.zero == 2:
        notes.append(
            "gradients of a pipeline stay whole until its last microbatch, so ZeRO 2 works as ZeRO 1 here"
        )
    return notes
