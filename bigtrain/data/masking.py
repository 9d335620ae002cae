"""Hide tokens for the masked objective (BERT, Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigtrain.data.order import Ints, Words, key, mix_array
from bigtrain.model.batch import IGNORE

_HIDDEN, _RANDOM = 0.8, 0.1  # of the chosen; the other tenth stays as it is
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment


def mask_tokens(
    tokens: Ints, sample_ids: Sequence[int], *, seed: int, rate: float, mask_id: int, ordinary: Ints
) -> tuple[Ints, Ints]:
    """Tokens (B, S) with some hidden, and targets (B, S): the true id where a token was chosen, else IGNORE.

    Each token among the `ordinary` ids (n,) is chosen with probability `rate`; of the chosen 80 % become
    `mask_id`, 10 % a random ordinary id, 10 % stay. A row with an ordinary token has at least one chosen.
    A pure function of (seed, sample id) and the row, whatever the batch.
    """
    is_ordinary = np.zeros(max(int(ordinary.max()), int(tokens.max())) + 1, bool)
    is_ordinary[ordinary] = True
    eligible = is_ordinary[tokens]
    draw = np.where(eligible, _uniform(_words(tokens.shape, sample_ids, seed, 2)), 2.0)
    rows = np.arange(len(tokens))
    luckiest = draw.argmin(1)
    chosen = draw < rate
    chosen[rows, luckiest] = eligible[rows, luckiest]

    fate = _uniform(_words(tokens.shape, sample_ids, seed, 3))
    replacement = ordinary[
        (_words(tokens.shape, sample_ids, seed, 4) % np.uint64(len(ordinary))).astype(np.int64)
    ]
    corrupted = np.where(chosen & (fate < _HIDDEN), mask_id, tokens)
    corrupted = np.where(chosen & (fate >= _HIDDEN) & (fate < _HIDDEN + _RANDOM), replacement, corrupted)
    return corrupted, np.where(chosen, tokens, IGNORE)


def _words(shape: tuple[int, ...], sample_ids: Sequence[int], seed: int, purpose: int) -> Words:
    """A random uint64 for each position of each sample: splitmix64 started at (seed, sample, purpose)."""
    starts = np.array([key(seed, sample, purpose) for sample in sample_ids], np.uint64)
    return mix_array(starts[:, None] + np.arange(1, shape[1] + 1, dtype=np.uint64) * _GOLDEN)


def _uniform(words: Words) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Words as numbers in [0, 1), from their highest 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
