"""How often to save: Young's formula, and how much of the time is left for training."""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419
"""Mean GPU-hours between unexpected interruptions, about 50,700: Llama 3 had 419 of them in 54 days on 16,384 H100s
(arXiv 2407.21783, section 3.3.4). Other clusters differ by a factor of 3 both ways."""

RESTART_SECONDS = 600.0
"""From a failure to the first step after it (noticed, rescheduled, loaded); assumed."""

HOST_COPY_GB_S = 10.0
"""GB/s at which one GPU's state is copied to host memory, for which training waits (PCIe 4 x16 moves at most 32, and
the GPUs of a node share the memory); assumed."""

STORE_GB_S = 2.0
"""GB/s that one node writes to shared storage; assumed."""


@dataclass(frozen=True)
class SavePlan:
    """When to save, and what it costs."""

    bytes: float
    """One checkpoint: fp32 weights and optimizer moments."""
    blocked_seconds: float
    """Training waits for this at each save."""
    write_seconds: float
    """From begin to end on the disk."""
    failure_hours: float
    """Mean time between failures of the whole job."""
    every_seconds: float
    """Time between saves that loses least."""
    goodput: float
    """Share of the wall time that is progress: without saves, repeated work and restarts."""


def save_plan(
    checkpoint_bytes: float,
    gpus: int,
    nodes: int,
    *,
    asynchronous: bool = True,
    store_gb_s: float = STORE_GB_S,
    gpu_hours_per_failure: float = GPU_HOURS_PER_FAILURE,
) -> SavePlan:
    """Young's interval sqrt(2 d M) for a wait of d a save and a mean time M between failures (CACM 17(9), 1974).

    A background write lets training wait only for the copy to host memory, but no save begins before the last one
    is written. `store_gb_s` is the speed of one node.
    """
    write = checkpoint_bytes / (store_gb_s * 1e9 * nodes)
    copy = checkpoint_bytes / (HOST_COPY_GB_S * 1e9 * gpus)
    blocked = copy if asynchronous else copy + write
    M = gpu_hours_per_failure / gpus * 3600
    every = max(math.sqrt(2 * blocked * M), copy + write)
    # Lost: a wait each `every`, and each M a restart and on average half an interval plus an unfinished write.
    lost = blocked / every + (RESTART_SECONDS + every / 2 + copy + write) / M
    return SavePlan(
        bytes=checkpoint_bytes,
        blocked_seconds=blocked,
        write_seconds=copy + write,
        failure_hours=M / 3600,
        every_seconds=every,
        goodput=1 / (1 + lost),
    )
