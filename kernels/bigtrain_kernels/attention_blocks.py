"""Block sizes of the attention kernels: fixed, so that no step waits for a tuner.

Each was compiled offline for sm_90 without spilling (tests/kernels/gate_attention.py). `python -m
benchmarks.tune_attention` times the candidates on a GPU and prints a new table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from bigtrain_kernels.checks import INTERPRETED


class Blocks(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int
    precision: str = "tf32"
    """Of products in fp32; 16-bit products have one precision."""


FORWARD = {
    16: Blocks(128, 64, 4, 3),
    32: Blocks(128, 64, 4, 3),
    64: Blocks(128, 64, 4, 3),
    128: Blocks(128, 128, 8, 2),
    256: Blocks(128, 64, 8, 2),
}
QUERIES = {
    16: Blocks(128, 64, 4, 3),
    32: Blocks(128, 64, 4, 3),
    64: Blocks(128, 64, 4, 3),
    128: Blocks(128, 64, 8, 2),
    256: Blocks(64, 64, 8, 1),
}
KEYS = {
    16: Blocks(64, 128, 8, 3),
    32: Blocks(64, 128, 8, 3),
    64: Blocks(64, 128, 8, 3),
    128: Blocks(64, 128, 8, 2),
    256: Blocks(32, 64, 8, 1),
}
TABLE = {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}


def blocks_for(part: str, dim: int, x: torch.Tensor) -> Blocks:
    """Blocks of a part ("forward", "queries", "keys") for heads of `dim`, a power of two, and the dtype of x."""
    if INTERPRETED:  # small shapes, and work for masks, loops and ragged ends in them
        return Blocks(32, 32, 4, 1, "ieee")
    return TABLE[part][dim]
