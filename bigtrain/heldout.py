"""Held-out loss: the same sequences every time, summed exactly over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from bigtrain.errors import RunError
from bigtrain.mesh import Mesh
from bigtrain.model.batch import IGNORE, Batch


@dataclass(frozen=True)
class HeldOut:
    """What a model makes of text it was not trained on."""

    loss: float
    """Mean cross-entropy of the counted tokens, nats a token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Total cross-entropy in bits over the UTF-8 bytes of the counted tokens: comparable across tokenizers."""
    tokens: int
    """Counted tokens."""
    bytes: int
    """UTF-8 bytes that the counted tokens stand for."""


def deal(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """This rank's share, equally many on every rank: ZeRO-3 gathers weights in every forward pass of all.

    A rank without a last batch of its own gets the first one with nothing to count.
    """
    mine = list(batches[mesh.data_rank :: mesh.data_size])
    missing = -(-len(batches) // mesh.data_size) - len(mine)
    blank = replace(batches[0], targets=torch.full_like(batches[0].targets, IGNORE))
    return mine + [blank] * missing


def held_out(
    eval_step: Callable[[Batch], float],
    batches: Sequence[Batch],
    token_bytes: npt.NDArray[np.int64],
    mesh: Mesh,
) -> HeldOut:
    """Evaluate this rank's `batches` (see `deal`) with `eval_step`, which returns a sum in nats.

    `token_bytes`: (V,) UTF-8 bytes each token stands for. Raises RunError when nothing counts.
    """
    nll = 0.0
    counted = length = 0
    for batch in batches:
        nll += eval_step(batch)
        targets = batch.targets[batch.targets != IGNORE].numpy()
        counted += len(targets)
        length += int(token_bytes[targets].sum())
    total, tokens, size = mesh.sum([nll, counted, length])
    if tokens == 0:
        raise RunError("the held-out sequences hold no token to predict", do="prepare more held-out text")
    loss = total / tokens
    return HeldOut(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows a double at 709
        bits_per_byte=total / math.log(2) / max(size, 1.0),
        tokens=int(tokens),
        bytes=int(size),
    )
