"""Dynamic loss scaling for fp16: multiply the loss so that small gradients do not vanish."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bigtrain.errors import RunError

WINDOW = 1000
"""Finite steps after which the scale doubles (DeepSpeed's `loss_scale_window`)."""
HYSTERESIS = 2
"""Overflows it takes to halve the scale (DeepSpeed's `hysteresis`)."""
FIRST_POWER = 16
"""The scale starts at 2 to this power."""


@dataclass
class LossScaler:
    """DeepSpeed's rule (runtime/fp16/loss_scaler.py): halve on overflow, double after WINDOW finite steps."""

    scale: float = 2.0**FIRST_POWER
    steps: int = 0
    last_overflow: int = -1
    hysteresis: int = HYSTERESIS

    def update(self, overflow: bool) -> None:
        """Count one step. Raises RunError when even a scale of 1 overflows."""
        if overflow:
            if self.hysteresis > 1:
                self.hysteresis -= 1
            elif self.scale <= 1.0:
                raise overflow_at_one()
            else:
                self.scale = max(self.scale / 2, 1.0)
            self.last_overflow = self.steps
        else:
            finite = self.steps - self.last_overflow - 1
            if finite > 0 and finite % WINDOW == 0:
                self.hysteresis = HYSTERESIS
                self.scale *= 2
        self.steps += 1

    def state(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


def overflow_at_one() -> RunError:
    """The error of a loss scale that cannot fall any further."""
    return RunError(
        "fp16 gradients overflow even with a loss scale of 1",
        where="train.precision",
        do='use "bf16", whose range is that of fp32, or lower optim.lr',
    )
