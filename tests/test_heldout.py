"""Held-out figures are sums over tokens and bytes, never means of means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bigtrain.errors import RunError
from bigtrain.heldout import held_out
from bigtrain.mesh import Mesh
from bigtrain.model.batch import IGNORE, Batch
from bigtrain.place import Place

MESH = Mesh(Place(0, 1, 0, 1, "single"), torch.device("cpu"), None)
BYTES = np.array([0, 1, 2, 4], dtype=np.int64)


def batch(targets: list[list[int]]) -> Batch:
    t = torch.tensor(targets)
    return Batch(t.clamp(min=0), t, None, torch.arange(len(targets)))


def test_unequal_batches_weigh_by_their_tokens() -> None:
    batches = [batch([[1, 2, 3]]), batch([[3, IGNORE, IGNORE]])]
    sums = iter([3.0, 5.0])
    result = held_out(lambda group: sum(next(sums) for _ in group), batches, BYTES, MESH)
    assert (result.tokens, result.bytes) == (4, 11)
    assert result.loss == pytest.approx(2.0)
    assert result.perplexity == pytest.approx(math.exp(2))
    assert result.bits_per_byte == pytest.approx(8.0 / math.log(2) / 11)


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(RunError, match="no token to predict"):
        held_out(lambda _: 0.0, [batch([[IGNORE, IGNORE]])], BYTES, MESH)
