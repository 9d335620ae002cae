"""One record a step, one an evaluation: what is in them, and the file that holds them all."""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from bigtrain.budget import Progress
    from bigtrain.engine.protocol import StepResult
    from bigtrain.heldout import HeldOut


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; numbers that are not finite are null in JSON."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean plain cross-entropy of the global batch, nats a token."""
    loss_z: float | None
    """Standard deviations between this loss and the mean of the last WINDOW; None for the first few."""
    grad_norm: float
    lr: float
    tokens: int
    """Tokens consumed so far."""
    samples: int
    """Sequences consumed so far."""
    epochs: float
    """Passes over the training split so far."""
    seconds: float
    """Of this step."""
    tokens_per_second: float
    tokens_per_second_per_device: float
    """A device is a rank: a GPU, or a CPU process."""
    mfu: float | None
    """Model FLOPs of this step over what the devices could do at their dense peak; None where that is
    unknown."""
    memory_bytes: int
    """Rank 0: peak allocated on its GPU, or resident in host memory."""
    skipped: bool
    """Loss or gradient was not finite, or refused as a spike; nothing was updated."""
    loss_scale: float
    time: float
    """Seconds since 1970."""
    kind: str = "step"


@dataclass(frozen=True)
class EvalRecord:
    """A held-out evaluation after `step` steps."""

    step: int
    loss: float
    """Mean cross-entropy, nats a token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Held-out tokens that counted."""
    time: float
    kind: str = "eval"


@dataclass(frozen=True)
class EventRecord:
    """Something that happened at `step`, and is worth knowing later."""

    step: int
    name: str
    """What it is: "straggler"."""
    text: str
    """For people."""
    data: dict[str, Any]
    """For programs."""
    time: float
    kind: str = "event"


Record = StepRecord | EvalRecord | EventRecord

WINDOW = 128
"""Steps that a loss is compared with (as llm.c's outlier detector)."""
_FEWEST = 16


@dataclass
class Meter:
    """Turns what the trainer knows into records; holds the window of recent losses."""

    devices: int
    tokens: int
    """Tokens consumed before the next step."""
    tokens_per_epoch: int
    flops_per_token: float
    """Of training: forward and backward (bigtrain.plan.flops)."""
    peak_flops: float | None
    """Of one device, dense, in FLOP/s."""
    device: torch.device
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def step(self, progress: Progress, result: StepResult, lr: float, seconds: float) -> StepRecord:
        """The record of the step that ended now."""
        speed = (progress.tokens - self.tokens) / max(seconds, 1e-9)
        self.tokens = progress.tokens
        z = self._z(result.loss)
        achieved = speed / self.devices * self.flops_per_token
        return StepRecord(
            step=progress.step,
            loss=result.loss,
            loss_z=z,
            grad_norm=result.grad_norm,
            lr=lr,
            tokens=progress.tokens,
            samples=progress.samples,
            epochs=progress.tokens / max(self.tokens_per_epoch, 1),
            seconds=seconds,
            tokens_per_second=speed,
            tokens_per_second_per_device=speed / self.devices,
            mfu=achieved / self.peak_flops if self.peak_flops else None,
            memory_bytes=memory_bytes(self.device),
            skipped=result.skipped,
            loss_scale=result.loss_scale,
            time=time.time(),
        )

    def evaluation(self, progress: Progress, result: HeldOut) -> EvalRecord:
        """The record of an evaluation that ended now."""
        return EvalRecord(
            progress.step, result.loss, result.perplexity, result.bits_per_byte, result.tokens, time.time()
        )

    def _z(self, loss: float) -> float | None:
        """Compare with the window, then join it; a loss that is not finite does neither."""
        if not math.isfinite(loss):
            return None
        window = list(self.recent)
        self.recent.append(loss)
        if len(window) < _FEWEST:
            return None
        spread = statistics.pstdev(window)
        return (loss - statistics.fmean(window)) / spread if spread > 0 else 0.0


def memory_bytes(device: torch.device) -> int:
    """Peak bytes allocated on a GPU, or those of this process that are resident now."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        return resident * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Dense bf16 tensor-core peak in TFLOP/s by a part of what torch.cuda.get_device_name says; the first one that
# fits counts. From the makers' data sheets, where NVIDIA's are halved if they are "with sparsity":
# nvidia.com/en-us/data-center/{a100,a10,l4,l40s,h100,h200,hgx,gb200-nvl72}, amd.com/en/products/accelerators.
_PEAK_TFLOPS = (
    ("GB300", 2500.0), ("GB200", 2500.0), ("B300", 2250.0), ("B200", 2250.0),
    ("H200 NVL", 835.5), ("GH200", 989.4), ("H200", 989.4),
    ("H100 PCIe", 756.0), ("H100 NVL", 835.5), ("H100", 989.4), ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0), ("A800", 312.0), ("A40", 149.7), ("A10G", None), ("A10", 125.0),
    ("L40S", 362.0), ("L40", 181.0), ("L4", 121.0),
    ("MI325X", 1307.4), ("MI300X", 1307.4), ("MI250X", 191.5),  # one of the two dies, which torch counts
)  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s by its name; None when unknown, since a guess makes MFU a lie."""
    for part, tflops in _PEAK_TFLOPS:
        if part in device_name:
            return None if tflops is None else tflops * 1e12
    return None


def to_json(record: Record) -> str:
    """One line; a number that is not finite becomes null, which every JSON reader takes."""
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(record).items()
    }
    return json.dumps({"kind": values.pop("kind"), **values}, separators=(", ", ": "), allow_nan=False) + "\n"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file in order, up to a torn line (a killed writer's, or one being written)."""
    if not path.exists():
        return
    with path.open("rb") as f:
        for line in f:
            record = _parsed(line)
            if record is None:
                return
            yield record


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A record; None for a torn line."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def cut_back(path: Path, step: int) -> int:
    """Keep the records up to `step` and drop the rest, torn lines too, in one truncation; returns records
    kept.

    A run that resumes from a checkpoint makes the later ones again.
    """
    if not path.exists():
        return 0
    kept = end = 0
    with path.open("r+b") as f:
        for line in f:
            record = _parsed(line)
            if record is None or record["step"] > step:
                break
            kept += 1
            end += len(line)
        f.truncate(end)
        os.fsync(f.fileno())
    return kept


def recent_losses(records: Iterable[dict[str, Any]]) -> deque[float]:
    """The window to give a Meter when a run goes on."""
    losses = (r["loss"] for r in records if r["kind"] == "step" and r["loss"] is not None)
    return deque(losses, maxlen=WINDOW)
