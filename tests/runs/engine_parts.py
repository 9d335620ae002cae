"""Small models and batches for the engine tests: the same global batches whatever the world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bigtrain.config import Config
from bigtrain.engine import Engine
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh
from bigtrain.model.batch import IGNORE, Batch
from bigtrain.model.build import build_model

S, V = 24, 96
STEPS = 20
LR = 1e-3
"""At 3e-3 models of 8 layers on 4 sequences a step magnify rounding: the gradient norms of two right layouts then
differ by up to 3e-5 after 17 steps, at 1e-3 by 2e-7 (measured on ten layouts of four stages)."""
TRANSFORMER: dict[str, Any] = {
    "vocab_size": V,
    "layers": 2,
    "width": 32,
    "heads": 4,
    "kv_heads": 2,
    "ffn_width": 40,
    "max_length": S,
    "tied": True,
    "qk_norm": True,
}
LSTM: dict[str, Any] = {"kind": "lstm", "vocab_size": V, "layers": 2, "width": 24, "dropout": 0.2}


def make_config(
    *,
    model: dict[str, Any] | None = None,
    optim: dict[str, Any] | None = None,
    layout: dict[str, Any] | None = None,
    precision: str = "fp32",
) -> Config:
    """A whole config around one of the tiny models; clipping is active from the first step."""
    return Config.model_validate(
        {
            "name": "tiny",
            "model": model or TRANSFORMER,
            "data": {"path": "none", "sequence_length": S},
            "train": {"steps": STEPS, "global_batch": 8, "precision": precision},
            "loss": {"z_loss": 1e-4},
            "optim": {"clip": 0.5, "lr": LR, **(optim or {})},
            "layout": layout or {},
        }
    )


def make_model(config: Config, device: torch.device | str = "cpu") -> torch.nn.Module:
    """The real model with its initial weights (on "meta": shapes only)."""
    return build_model(
        config.model,
        config.loss,
        kernels=config.layout.kernels,
        recompute=config.layout.recompute,
        device=device,
        seed=config.train.seed,
    )


def lr_of(step: int) -> float:
    """Rises and falls, so that a rate set too late is seen."""
    return LR * min(1.0, (step + 1) / 5) * 0.97**step


SEQUENCES = (4, 4, 4, 8)
"""Sequences of every step, over and over: the number of microbatches changes, as in a batch ramp."""


def sample(number: int) -> Batch:
    """One sequence: two or three documents of unequal length, and a masked share that varies from 0 to 1."""
    g = torch.Generator().manual_seed(1000 + number)
    tokens = torch.randint(0, V, (1, S + 1), generator=g)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(1, S, generator=g) < (number % 5) / 4] = IGNORE
    cut = sorted({0, S, *torch.randint(1, S, (1 + number % 2,), generator=g).tolist()})
    return Batch(
        tokens[:, :-1],
        targets,
        torch.tensor(cut, dtype=torch.int32),
        torch.tensor([number], dtype=torch.int64),
    )


def microbatches(
    step: int, mesh: Mesh | None = None, sequences: Sequence[int] = SEQUENCES
) -> tuple[list[Batch], int]:
    """This rank's microbatches of a step, and the counted tokens of all ranks."""
    first = sum(sequences[s % len(sequences)] for s in range(step))
    numbers = range(first, first + sequences[step % len(sequences)])
    counted = sum(sample(n).counted() for n in numbers)
    rank, size = (mesh.data_rank, mesh.data_size) if mesh else (0, 1)
    return [sample(n) for n in numbers[rank::size]], counted


def train(
    engine: Engine, steps: range, mesh: Mesh | None = None, sequences: Sequence[int] = SEQUENCES
) -> dict[str, list[float]]:
    """Losses and gradient norms of some steps."""
    losses, norms = [], []
    for step in steps:
        batches, counted = microbatches(step, mesh, sequences)
        result = engine.train_step(batches, counted, lr_of(step))
        assert not result.skipped
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return {"loss": losses, "norm": norms}


Tensors = dict[str, torch.Tensor]


def box(piece: Piece, whole: torch.Tensor) -> torch.Tensor:
    """The piece's box of a whole tensor."""
    view = whole
    for dim, (start, size) in enumerate(zip(piece.offset, piece.tensor.shape, strict=True)):
        view = view.narrow(dim, start, size)
    return view


def local_boxes(
    engine: Engine, owned: bool = True
) -> list[tuple[str, tuple[int, ...], tuple[int, ...], Any]]:
    """(kind/name, shape, offset, copy) of every piece: what a checkpoint would write."""
    return [
        (f"{p.kind}/{p.name}", p.shape, p.offset, p.tensor.detach().cpu().clone())
        for p in engine.pieces(owned)
    ]


def assemble(boxes: Iterator[Any] | list[Any]) -> Tensors:
    """Whole logical tensors from boxes. Every element must come exactly once."""
    whole: Tensors = {}
    seen: Tensors = {}
    for key, shape, offset, tensor in boxes:
        value = whole.setdefault(key, torch.zeros(shape))
        times = seen.setdefault(key, torch.zeros(shape))
        piece = Piece("", key, shape, offset, tensor)
        box(piece, value).copy_(tensor)
        box(piece, times).add_(1)
    for key, times in seen.items():
        assert bool((times == 1).all()), f"{key}: elements owned {times.min():.0f} to {times.max():.0f} times"
    return whole


def gathered(engine: Engine, mesh: Mesh) -> Tensors:
    """All logical tensors of a run, on every rank."""
    boxes = [b for part in mesh.gather(local_boxes(engine)) for b in part]  # type: ignore[attr-defined]
    return assemble(boxes)


def fill(engine: Engine, whole: Tensors, extra: dict[str, Any]) -> None:
    """Load logical tensors into an engine."""
    for piece in engine.pieces(owned=False):
        piece.tensor.copy_(box(piece, whole[f"{piece.kind}/{piece.name}"]))
    engine.loaded(extra)
