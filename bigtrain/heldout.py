"""Held-out loss: the same sequences every time, summed exactly over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from bigtrain.errors import RunError
from bigtrain.mesh import Mesh
from bigtrain.model.batch import IGNORE, Batch

AT_ONCE = 64
"""Microbatches handed to the engine together: enough to fill a pipeline, few enough to hold in memory."""


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


def held_out(
    evaluate: Callable[[Sequence[Batch]], float],
    batches: Iterable[Batch],
    token_bytes: npt.NDArray[np.int64],
    mesh: Mesh,
) -> HeldOut:
    """Evaluate this data rank's `batches` with `evaluate`, which returns this rank's part of the sum in nats.

    Collective: every rank has equally many batches, for ZeRO-3 gathers weights in each forward pass of all.
    `token_bytes`: (V,) UTF-8 bytes each token stands for. Raises RunError when nothing counts.
    """
    nll = 0.0
    counted = length = 0
    left = iter(batches)
    while group := list(islice(left, AT_ONCE)):
        nll += evaluate(group)
        for batch in group if mesh.leads else ():  # the other ranks of its model read the same samples
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
