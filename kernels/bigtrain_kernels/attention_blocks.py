"""Block sizes of the attention kernels: fixed, so that no step waits for a tuner.

Each was compiled offline for sm_90 without spilling (tests/kernels/gate_attention.py). `python -m
benchmarks.tune_attention` times the candidates on a GPU and prints a new table.
"""

from __future__ import annotations

from typing import NamedTuple

from bigtrain_kernels.checks import INTERPRETED


class Blocks(NamedTuple):
    rows: int
    keys: int
    warps: int
    stages: int


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
    256: Blocks(64, 32, 8, 2),
}
KEYS = {
    16: Blocks(64, 128, 8, 3),
    32: Blocks(64, 128, 8, 3),
    64: Blocks(64, 128, 8, 3),
    128: Blocks(64, 128, 8, 2),
    256: Blocks(16, 64, 8, 2),
}
TABLE = {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}
CAPPED = {("queries", 64): Blocks(128, 64, 8, 3), ("keys", 128): Blocks(32, 128, 8, 2)}
"""Where a softcap, which needs more registers, takes others."""


def blocks_for(part: str, dim: int, capped: bool = False) -> Blocks:
    """Blocks of a part ("forward", "queries", "keys") for heads of `dim`, a power of two."""
    if INTERPRETED:  # small shapes, with ragged ends, masks and more than one turn of each loop
        return Blocks(32, 32, 4, 1)
    return CAPPED.get((part, dim), TABLE[part][dim]) if capped else TABLE[part][dim]
