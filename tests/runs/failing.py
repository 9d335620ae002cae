"""`bigtrain train` with a fault of a test's choice: python -m tests.runs.failing FAULT RANK STEP train CONFIG ...

On rank RANK, before step STEP (from 1), FAULT: "kill" and "stop" send this process SIGKILL and SIGSTOP, "sleep" and
"lock" never come back, "nap" comes back after 6 s, "slow" makes every layer of this rank 30 ms slower from then on.
"data": its thread that reads data never comes back with that step's, as from a file system that hangs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as bigtrain.cli does before it imports torch

from bigtrain.cli import main
from bigtrain.model.batch import Batch


def plant(fault: str, step: int) -> None:
    """Let the fault come before a step."""
    from bigtrain.trainer import Trainer

    sound = Trainer._step

    def faulty(trainer: Trainer, *arguments: Any) -> None:
        if trainer.progress.step + 1 == step:
            happen(fault)
        sound(trainer, *arguments)

    Trainer._step = faulty  # type: ignore[method-assign]


def hang_at_data(step: int) -> None:
    """Let the thread that reads ahead hang at a step."""
    from bigtrain.data.loader import Loader, Step

    sound = Loader._steps

    def hanging(loader: Loader, plan: Iterable[Step], device: int | None) -> Iterator[list[Batch]]:
        for n, batches in enumerate(sound(loader, plan, device), 1):
            if n == step:
                happen("lock")
            yield batches

    Loader._steps = hanging  # type: ignore[method-assign]


def happen(fault: str) -> None:
    """The fault."""
    match fault:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(1000)
        case "lock":
            never = threading.Lock()
            never.acquire()
            never.acquire()
        case "nap":
            for _ in range(3):
                time.sleep(2.0)
        case "slow":
            from bigtrain.model.transformer import Block

            sound = Block.forward

            def slow(block: Block, *arguments: Any, **named: Any) -> Any:
                time.sleep(0.03)
                return sound(block, *arguments, **named)

            Block.forward = slow  # type: ignore[method-assign]
        case _:
            raise AssertionError(f"no such fault: {fault}")


if __name__ == "__main__":
    fault, rank, step, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        (hang_at_data if fault == "data" else partial(plant, fault))(int(step))
    sys.exit(main(arguments))
