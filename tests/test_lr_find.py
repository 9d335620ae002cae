"""The range test's suggestion lies where the loss falls, well before it diverges."""

from __future__ import annotations

import numpy as np
import pytest

from bigtrain.errors import RunError
from bigtrain.lr_find import suggest


def test_suggestion_lies_between_no_progress_and_divergence() -> None:
    lrs = np.geomspace(1e-6, 1.0, 120)
    # Flat at 8 below 1e-4, falls to 4 around 3e-2, explodes above 1e-1.
    x = np.log10(lrs)
    losses = 8 - 4 / (1 + np.exp(-4 * (x + 3))) + np.exp(np.clip((x + 1.2) * 8, -50, 5))
    found = suggest(lrs.tolist(), losses.tolist())
    assert 1e-4 < found.suggestion < 2e-2
    assert found.suggestion <= found.lowest / 3


def test_a_loss_that_never_falls_is_an_error() -> None:
    with pytest.raises(RunError, match="never fell"):
        suggest(np.geomspace(1e-6, 1, 50).tolist(), [8.0] * 50)
