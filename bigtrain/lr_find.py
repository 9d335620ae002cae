"""Which learning rate? Raise it step by step until the loss diverges, and draw the curve.

The range test of Smith (2015, arXiv 1506.01186): the loss falls fastest a little below the rate at which training
becomes unstable. Start large and decrease, as the primer says, but know where "too large" begins.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bigtrain.budget import Progress
from bigtrain.config import Config
from bigtrain.errors import RunError, UserError

FIRST, STEPS = 1e-6, 120
LAST = {"adamw": 1.0, "muon": 1.0, "sgd": 100.0}


@dataclass(frozen=True)
class Finding:
    """The test's points and what they suggest."""

    lrs: list[float]
    losses: list[float]
    """Training loss at each rate, nats a token."""
    smoothed: list[float]
    suggestion: float
    """A peak learning rate to start with."""
    lowest: float
    """The rate at which the smoothed loss was lowest: about where training begins to be unstable."""


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> Finding:
    """Smooth the curve, find its lowest point and the steepest fall before it.

    The suggestion is the rate of steepest fall, but no more than a third of the rate with the lowest loss.
    Raises RunError when the loss never fell.
    """
    smoothed: list[float] = []
    average = 0.0
    for i, loss in enumerate(losses):
        average = 0.85 * average + 0.15 * loss
        smoothed.append(average / (1 - 0.85 ** (i + 1)))  # bias-corrected, as in Adam
    low = min(range(len(smoothed)), key=smoothed.__getitem__)
    if low < 3 or smoothed[low] > 0.98 * smoothed[0]:
        raise RunError(
            f"the loss never fell: {smoothed[0]:.3f} at lr {lrs[0]:.1e}, at best {smoothed[low]:.3f}",
            where="--lr-find",
            do="check the data and the model, or raise train.global_batch to calm the noise",
        )
    slopes = [(smoothed[i + 1] - smoothed[i - 1]) for i in range(1, low)]
    steepest = 1 + min(range(len(slopes)), key=slopes.__getitem__)
    return Finding(
        list(lrs), list(losses), smoothed, suggestion=min(lrs[steepest], lrs[low] / 3), lowest=lrs[low]
    )


def lr_find(config: Config, run: str | Path) -> int:
    """Run the test on the real model, data and optimizer; write RUN/lr_find.json and .png; print the result.

    No checkpoint is read or written; the run itself is left as it is.
    """
    from bigtrain.interop.initial import start_from
    from bigtrain.plots import lr_find_curve
    from bigtrain.train import assemble, join

    folder = Path(run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"cannot be a folder: {e.strerror}", where=str(run), do="give another --run-dir"
        ) from e
    mesh = join(config)
    factor = (LAST[config.optim.kind] / FIRST) ** (1 / (STEPS - 1))
    lrs: list[float] = []
    losses: list[float] = []
    with contextlib.ExitStack() as stack:
        stack.callback(mesh.close)
        parts = assemble(config, mesh)
        stack.callback(parts.close)
        if config.train.init_from is not None:
            start_from(config.train.init_from, parts.engine, config, mesh)
        for i, microbatches in enumerate(parts.steps(Progress(), STEPS)):
            lr = FIRST * factor**i
            (counted,) = mesh.sum([sum(b.counted() for b in microbatches) if mesh.leads else 0])
            loss = parts.engine.train_step(microbatches, int(counted), lr).loss
            if not math.isfinite(loss) or (losses and loss > 2.0 * min(losses) + 1.0):
                break
            lrs.append(lr)
            losses.append(loss)
            if mesh.first and i % 10 == 0:
                print(f"lr-find {i + 1:3d}/{STEPS}  lr {lr:.2e}  loss {loss:.4f}", flush=True)
    if not mesh.first:
        return 0
    found = suggest(lrs, losses)
    (folder / "lr_find.json").write_text(json.dumps(vars(found), indent=1) + "\n")
    picture = lr_find_curve(found.lrs, found.losses, found.suggestion, folder / "lr_find.png")
    diverged = len(lrs) < STEPS
    print(
        f"\nlowest loss at lr {found.lowest:.1e}, "
        + (
            "a little below where it diverges\n"
            if diverged
            else "and it did not diverge up to the largest rate\n"
        )
        + f"start with       --set optim.lr={found.suggestion:.1e}\n"
        f"curve            {picture}"
    )
    return 0
