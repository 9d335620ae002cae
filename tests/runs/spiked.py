"""`bigtrain` with errors planted in what it reads and does; run as `python -m tests.runs.spiked VERB ...`.

The variable PLANT holds JSON:
    bad [first, last]     the targets of these samples are one token that the text never has
    without [first, last] these samples are not there: whoever asks for a later one gets one further on
    nan [first, last]     the objective of a microbatch with one of these samples is not a number, on its ranks only
    still [step, ...]     the optimizer makes no update at these steps (one process), whatever the guard says
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bigtrain.cli import main
from bigtrain.data.loader import Loader
from bigtrain.engine.reference import ReferenceEngine
from bigtrain.model.batch import IGNORE, Batch
from bigtrain.model.transformer import Transformer

NEVER = 1
"""A control token, which stands nowhere between the documents of the tiny corpus as a target."""


def plant_bad(first: int, last: int) -> None:
    """Targets that no model expects."""
    honest = Loader.batch

    def batch(self: Loader, sample_ids: Sequence[int]) -> Batch:
        made = honest(self, sample_ids)
        bad = torch.tensor([first <= n <= last for n in sample_ids])[:, None] & (made.targets != IGNORE)
        return replace(made, targets=made.targets.masked_fill(bad, NEVER))

    Loader.batch = batch  # type: ignore[method-assign]


def plant_without(first: int, last: int) -> None:
    """The order without these samples, as if it had never held them."""
    honest = Loader.batch

    def batch(self: Loader, sample_ids: Sequence[int]) -> Batch:
        return honest(self, [n if n < first else n + last + 1 - first for n in sample_ids])

    Loader.batch = batch  # type: ignore[method-assign]


def plant_nan(first: int, last: int) -> None:
    """A forward pass goes wrong on the ranks that read these samples."""
    honest = Transformer.forward

    def forward(self: Any, tokens: Any, *args: Any, **more: Any) -> Any:
        out = honest(self, tokens, *args, **more)
        ids = more.get("sample_ids")
        if self.training and ids is not None and any(first <= n <= last for n in ids.tolist()):
            return out._replace(objective=out.objective * float("nan"))
        return out

    Transformer.forward = forward  # type: ignore[method-assign]


def plant_still(*steps: int) -> None:
    """As if the step's update had never been called."""
    honest, calls = ReferenceEngine._update, [0]

    def update(self: ReferenceEngine, norm: float, scale: float, lr: float) -> None:
        calls[0] += 1
        if calls[0] not in steps:
            honest(self, norm, scale, lr)

    ReferenceEngine._update = update  # type: ignore[method-assign]


PLANTS = {"bad": plant_bad, "without": plant_without, "nan": plant_nan, "still": plant_still}

if __name__ == "__main__":
    for name, numbers in json.loads(os.environ["PLANT"]).items():
        PLANTS[name](*numbers)
    sys.exit(main(sys.argv[1:]))
