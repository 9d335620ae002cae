"""The numerics guard: finds spikes of the loss and the gradient norm before the update, and answers by policy.

A step is a spike when its loss, or the logarithm of its gradient norm, lies more than `guard.sigma` robust standard
deviations above the last updates: above the median of the newer half of the last `guard.window`, in units of 1.4826 x
the median absolute deviation from a line through the medians of both halves (Tukey's resistant line). Medians do not
notice a few spikes in the window, where a mean and a standard deviation would hide the second of two; the line keeps
the fall of the curve out of its noise; the logarithm is there because gradient norms are skewed to the right. On 2,000
steps of the quickstart ordinary steps reach 3.1 (loss) and 6.8 (norm), one strange batch 5.0 and 15.3. PaLM cured
spikes by going back about 100 steps and leaving out 200 to 500 batches (arXiv:2204.02311, 5.1).

Every rank decides for itself, from two numbers that the engine has brought to every rank's host anyway, and they are
the same there to the bit. Layouts differ in the last digits of both (1e-7): a step that lies that close to the
threshold may be a spike in one layout and none in another.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from bigtrain.budget import Progress, sample_id, united
from bigtrain.config import Config
from bigtrain.engine.protocol import StepResult
from bigtrain.errors import RunError

_LOSS_FLOOR, _NORM_FLOOR = 0.005, 0.1
"""Least standard deviation of losses (as a share of their median) and of logarithms of norms: a curve so smooth that it
has almost none is not to raise an alarm at every ripple."""


@dataclass(frozen=True)
class Finding:
    """A step that was wrong, and what is done about it."""

    what: Literal["spike", "not finite"]
    action: Literal["warn", "skip", "rollback"]
    step: int
    """Counted from 1."""
    first_sample: int
    """First sample of those concerned: the step's own, for a rollback all that is left out."""
    last_sample: int
    loss: float
    loss_z: float | None
    """Robust standard deviations above the last updates; None until half of the window is full."""
    grad_norm: float
    norm_z: float | None
    """The same of the logarithm of the gradient norm."""

    def sentence(self) -> str:
        """For people."""
        samples = f"samples {self.first_sample:,} to {self.last_sample:,}"
        if self.what == "not finite":
            return f"step {self.step}: the loss or gradient was not finite; the update is skipped ({samples})"
        spike = (
            f"step {self.step}: spike, loss {self.loss:.4f} ({_shown(self.loss_z)}), "
            f"gradient norm {self.grad_norm:.4g} ({_shown(self.norm_z)})"
        )
        match self.action:
            case "warn":
                return f"{spike}; {samples}"
            case "skip":
                return f"{spike}; the update is skipped ({samples})"
            case "rollback":
                return f"{spike}; {samples} are left out from now on"

    def record(self) -> dict[str, Any]:
        """For programs, as JSON: numbers that are not finite are None."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()
        }


class Guard:
    """Judges every step; holds the window, and which samples the run leaves out."""

    def __init__(self, config: Config) -> None:
        self.policy = config.guard
        self.max_skipped = config.train.max_skipped
        self._skip = config.data.skipped
        self.rolled: list[Finding] = []
        """The spikes that the run was rolled back for."""
        self.refused = False
        """Whether the last step was refused as a spike."""
        self._losses: deque[float] = deque(maxlen=self.policy.window)
        self._norms: deque[float] = deque(maxlen=self.policy.window)
        self._starts: deque[int] = deque(maxlen=self.policy.leave_out)
        self._row = 0
        self._row_first = 0

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """Ranges [first, last] of samples that are not read (`budget.sample_id`)."""
        return united([*self._skip, *((f.first_sample, f.last_sample) for f in self.rolled)])

    def refuses(self, loss: float, norm: float) -> bool:
        """Whether the update is left out (`engine.protocol.Refuse`); the engine asks before it makes it."""
        return self.policy.on_spike != "warn" and self._spike(*self._z(loss, norm))

    def look(self, before: Progress, after: Progress, result: StepResult) -> Finding | None:
        """Take note of a step from `before` to `after`; what was wrong with it, if anything.

        Raises RunError when a spike is one more than `guard.max_rollbacks`.
        """
        self._starts.append(before.samples)
        loss, norm = result.loss, result.grad_norm
        finite = math.isfinite(loss) and math.isfinite(norm)
        loss_z, norm_z = self._z(loss, norm) if finite else (None, None)
        spike = self._spike(loss_z, norm_z)
        self.refused = spike and result.skipped
        if not result.skipped:
            self._losses.append(loss)
            self._norms.append(norm)
        first, last = self._ids(before.samples, after.samples)
        self._row_first = self._row_first if self._row else first
        self._row = self._row + 1 if result.skipped else 0
        if not spike and not result.skipped:
            return None
        action = self.policy.on_spike if spike else "skip"
        if action == "rollback":
            first, last = self._ids(self._starts[0], after.samples)
        found = Finding(
            "spike" if spike else "not finite", action, after.step, first, last, loss, loss_z, norm, norm_z
        )
        if action == "rollback" and len(self.rolled) >= self.policy.max_rollbacks:
            raise self._too_many(found)
        return found

    def check_row(self, found: Finding) -> None:
        """Raises RunError after `train.max_skipped` steps in a row that were left out, the found one the last."""
        if self._row >= self.max_skipped:
            raise RunError(
                f"{self._row} steps in a row had a loss or gradient that is not finite, or a spike; none changed "
                f"the weights. They read samples {self._row_first} to {found.last_sample}",
                where=f"step {found.step}",
                do="lower optim.lr or lengthen optim.warmup_steps, then resume from the newest checkpoint "
                "with the same command",
            )

    def skipping(self, found: Finding, before: Progress) -> Finding:
        """A spike that cannot be rolled back: the update of its step, which read from `before` on, is left out."""
        return replace(found, action="skip", first_sample=sample_id(before.samples, self.left_out))

    def latest(self, found: Finding) -> int:
        """The last step whose weights have not seen what a rollback for `found` leaves out."""
        return found.step - len(self._starts)

    def roll_back(self, found: Finding, state: Mapping[str, Any]) -> None:
        """The run is back at the checkpoint with the guard's `state`; it leaves out what was found, from now on."""
        rolled = [*self.rolled, found]
        self.load(state)
        self.rolled = rolled

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint: a resumed run decides as one that was never interrupted."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "starts": list(self._starts),
            "row": [self._row, self._row_first],
            "rolled": [asdict(found) for found in self.rolled],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint holds; {} (one of an older version) is an empty window."""
        for values, key in ((self._losses, "losses"), (self._norms, "norms"), (self._starts, "starts")):
            values.clear()
            values.extend(state.get(key, ()))
        self._row, self._row_first = state.get("row", (0, 0))
        self.rolled = [Finding(**found) for found in state.get("rolled", ())]
        self.refused = False

    def _ids(self, start: int, end: int) -> tuple[int, int]:
        """First and last sample of those that are the run's start-th to (end - 1)-th."""
        return sample_id(start, self.left_out), sample_id(end - 1, self.left_out)

    def _z(self, loss: float, norm: float) -> tuple[float | None, float | None]:
        """Deviations of a step's loss and of its gradient norm's logarithm; None while the window is too empty."""
        if 2 * len(self._losses) < self.policy.window:
            return None, None
        losses = list(self._losses)
        return (
            robust_z(loss, losses, _LOSS_FLOOR * abs(statistics.median(losses))),
            robust_z(_log(norm), [_log(n) for n in self._norms], _NORM_FLOOR),
        )

    def _spike(self, *deviations: float | None) -> bool:
        return any(z is not None and z > self.policy.sigma for z in deviations)

    def _too_many(self, found: Finding) -> RunError:
        ranges = ", ".join(f"{first} to {last}" for first, last in self.left_out)
        return RunError(
            f"{found.sentence().split(';')[0]}, after {len(self.rolled)} rollbacks for spikes (samples {ranges} are "
            f"left out)",
            where=f"step {found.step}",
            do="lower optim.lr, look at the data of these samples, or raise guard.max_rollbacks, then resume with "
            "the same command",
        )


def robust_z(value: float, window: Sequence[float], floor: float) -> float:
    """How many robust standard deviations, of at least `floor`, `value` lies above the newer half of `window`."""
    half = len(window) // 2
    level = statistics.median(window[half:])
    slope = (level - statistics.median(window[:half])) / (len(window) / 2)
    flat = [x - slope * i for i, x in enumerate(window)]
    middle = statistics.median(flat)
    spread = 1.4826 * statistics.median([abs(x - middle) for x in flat])
    return (value - level) / max(spread, floor, 1e-30)


def missing(rolled: Iterable[Finding], records: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """The rollbacks that no event record tells of (a kill, or a later rollback, took theirs)."""
    told = {(r["data"]["step"], r["data"]["first_sample"]) for r in records if r.get("name") == "rollback"}
    return [found for found in rolled if (found.step, found.first_sample) not in told]


def _log(norm: float) -> float:
    """Natural logarithm; a norm of 0 (a step without a counted token) counts as a very small one."""
    return math.log(max(norm, 1e-30))


def _shown(z: float | None) -> str:
    return "no z yet" if z is None else f"{z:+.1f}z"
