"""The training loop: repeat forward, loss, backward, update; evaluate, save and stop at safe points.

It knows an Engine, a Loader and a few callbacks; neither DeepSpeed nor a backend by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bigtrain.budget import BatchSchedule, Progress, sample_id
from bigtrain.config import Config
from bigtrain.data.prefetch import Prefetch
from bigtrain.engine.protocol import Engine, StepResult
from bigtrain.errors import RunError
from bigtrain.guard import Finding, Guard
from bigtrain.heartbeat import Pulse
from bigtrain.heldout import HeldOut, held_out
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.signals import StopFlag
from bigtrain.stragglers import OwnTime


class Observer(Protocol):
    """What the loop tells the outside; all of it on every rank, in the same order."""

    def on_step(self, progress: Progress, result: StepResult, lr: float, seconds: float) -> None:
        """A step is done; `progress` counts it."""

    def on_eval(self, progress: Progress, result: HeldOut) -> None:
        """A held-out evaluation is done."""

    def on_finding(self, progress: Progress, found: Finding) -> None:
        """The guard found the step that led to `progress` wrong: it was made all the same, or left out."""

    def roll_back(self, found: Finding) -> bool:
        """Load the newest sound checkpoint before what is left out, with a guard that leaves it out.

        False, with nothing changed, where there is no such checkpoint.
        """

    def on_save(self, progress: Progress) -> None:
        """Now is the moment to save; the save may go on in the background."""

    def save_failed(self) -> bool:
        """Whether a save in the background has failed on this rank."""

    def settle(self) -> None:
        """Wait for the save in the background; raises RunError on every rank when it failed on one."""


@dataclass
class Trainer:
    """One run from `progress` to `total_steps`."""

    config: Config
    mesh: Mesh
    engine: Engine
    observer: Observer
    schedule: BatchSchedule
    learning_rate: Callable[[int], float]
    """Step number (from 0) to learning rate."""
    total_steps: int
    progress: Progress
    held_out_batches: Sequence[Batch]
    token_bytes: npt.NDArray[np.int64]
    stop: StopFlag
    guard: Guard
    resumed: bool = False
    """Whether the run stands at a checkpoint, where it was evaluated before."""
    clock: OwnTime = field(default_factory=lambda: OwnTime(Pulse(), torch.device("cpu")))
    """Told of every bit of progress, so that the watchdog knows where the run stands."""
    _saved_at: float = field(default_factory=time.monotonic)
    _saved_step: int = -1

    def run(self, steps: Iterator[list[Batch]]) -> Literal["done", "preempted", "rolled back"]:
        """Train on `steps` (this rank's microbatches of every step left).

        "rolled back": the observer has loaded a former checkpoint, from which another Trainer is to go on. Raises
        RunError after `train.max_skipped` steps in a row that were left out.
        """
        if self.progress.step == 0 and self.config.train.eval_every and not self.resumed:
            self._evaluate()  # what the untrained model makes of it: where the curve starts
        if self.progress.step == 0 and self.config.guard.on_spike == "rollback" and not self.resumed:
            self._save()  # the weights to go back to until the first save
        self._saved_step = self.progress.step
        while self.progress.step < self.total_steps:
            started = time.perf_counter()
            self.clock.pulse.mark("waiting for data", self.progress.step + 1)
            self.clock.begin(self.progress.step + 1)
            microbatches = self._wait(steps)
            self.clock.has_data()
            self.clock.pulse.mark("training")
            mine = sum(b.counted() for b in microbatches) if self.mesh.leads else 0
            counted, stop, overdue, unsaved, refused = self.mesh.sum(
                [mine, self.stop.anywhere, self._overdue(), self.observer.save_failed(), self.guard.refused]
            )
            self._agreed(int(refused))
            if unsaved:
                self.observer.settle()
            if stop:
                self._save()
                self.observer.settle()
                return "preempted"
            if overdue:
                self._save()
                started = time.perf_counter()
            if self._step(microbatches, int(counted), started):
                return "rolled back"
            self.clock.end()
            self.clock.pulse.stepped = True
            # Evaluated before saved: a kill between the two makes the step, and so the evaluation, again.
            last = self.progress.step == self.total_steps
            if last or self._due(self.config.train.eval_every):
                self._evaluate()
            if last or self._due(self.config.checkpoint.every_steps):
                self._save()
        self.observer.settle()
        return "done"

    def _wait(self, steps: Iterator[list[Batch]]) -> list[Batch]:
        """The next microbatches; none once the run is asked to stop while they do not come, for they are not needed.

        Without read-ahead (data.prefetch = 0) the main thread reads, and the request waits for the data.
        """
        if isinstance(steps, Prefetch):
            while not steps.ready(0.2):
                if self.stop.anywhere:
                    return []
        return next(steps)

    def _step(self, microbatches: list[Batch], counted: int, started: float) -> bool:
        """One step; whether the run was rolled back instead."""
        before = self.progress
        lr = self.learning_rate(before.step)
        result = self.engine.train_step(microbatches, counted, lr, self.guard.refuses)
        sequences, length = self.schedule.at(before.step, sample_id(before.samples, self.guard.left_out))
        after = Progress(
            step=before.step + 1,
            samples=before.samples + sequences,
            tokens=before.tokens + sequences * length,
        )
        found = self.guard.look(before, after, result)
        if found is not None and found.action == "rollback":
            self.clock.pulse.mark("rolling back")
            if self.observer.roll_back(found):
                return True
            found = self.guard.skipping(found, before)
        self.progress = after
        self.observer.on_step(after, result, lr, time.perf_counter() - started)
        if found is not None:
            self.observer.on_finding(after, found)
            self.guard.check_row(found)
        return False

    def _agreed(self, refused: int) -> None:
        """RunError unless all ranks refused the last step or none did."""
        if refused not in (0, self.mesh.world):
            raise RunError(
                f"{refused} of {self.mesh.world} ranks took step {self.progress.step} for a spike: their loss or "
                "gradient norm is not the same number, so their weights differ too",
                where="guard",
                do="resume with the same command; if it comes again, report it with the layout and the hardware",
            )

    def _due(self, every: int) -> bool:
        """Whether the step just done is a multiple of `every` (0: never)."""
        return every > 0 and self.progress.step % every == 0

    def _overdue(self) -> bool:
        """Whether the clock of rank 0 asks for a save (one clock decides, else ranks could disagree)."""
        minutes = self.config.checkpoint.every_minutes
        return self.mesh.first and minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _save(self) -> None:
        self.clock.pulse.mark("saving")
        if self._saved_step != self.progress.step:
            self.observer.on_save(self.progress)
        self._saved_step, self._saved_at = self.progress.step, time.monotonic()

    def _evaluate(self) -> None:
        self.clock.pulse.mark("evaluating")
        if self.held_out_batches:
            result = held_out(self.engine.evaluate, self.held_out_batches, self.token_bytes, self.mesh)
            self.observer.on_eval(self.progress, result)
