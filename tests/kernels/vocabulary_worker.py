"""What a rank of the split vocabulary computes: python -m tests.kernels.vocabulary_worker FOLDER"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from bigtrain_kernels import linear_cross_entropy as module

from tests.kernels.test_linear_cross_entropy import OPTIONS, SMALL, made, results


def main(folder: Path) -> None:
    """Every case on this rank's rows of the weight; loss and gradients to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    module._FEWEST = 16
    hidden, weight, targets = made(41, 24, 131, torch.float32)
    first, end = 131 * rank // world, 131 * (rank + 1) // world
    for i, options in enumerate(OPTIONS[:4]):
        for reduction in ("mean", "none"):
            split: Any = {
                "group": dist.group.WORLD,
                "first": first,
                "vocabulary": 131,
                "reduction": reduction,
            }
            # The second budget is 33 tokens of 33 rows, and more of 32 rows: ranks must not cut by their own part.
            found = results(
                module.linear_cross_entropy, hidden, weight[first:end], targets, budget=SMALL, **split, **options
            )  # fmt: skip
            share = results(
                module.linear_cross_entropy, hidden, weight[first:end], targets, budget=33 * 33 * 4,
                sum_hidden=False, **split, **options,
            )[1]  # fmt: skip
            torch.save([*found, share], folder / f"{i}-{reduction}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
