"""What measured runs say about the planner, kept in a file, and how that corrects the next plan.

Runs whose kernels work on the same shapes are off by nearly the same factor, whatever their depth, stages and data
ranks: on published step times that were left out, errors of 5.4 % become 1.8 % (benchmarks/results/plan.json).
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.errors import UserError
from bigtrain.plan.constants import Constants
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.job import Job
from bigtrain.plan.steptime import StepTime, time_of


@dataclass(frozen=True)
class Shape:
    """What the kernels of one rank work on in a layer and microbatch, and whose kernels these are."""

    kind: str
    width: int
    ffn: int
    heads: int
    kv_heads: int
    microbatch: int
    sequence_length: int
    tensor: int
    sequence: bool
    context: int
    recompute: str
    precision: str
    attention: str
    kernels: bool
    software: str

    @classmethod
    def of(cls, job: Job) -> Shape:
        """Of a job."""
        m = job.model
        transformer = m.kind == "transformer"
        return cls(
            kind=m.kind,
            width=m.width,
            ffn=m.ffn if transformer else 0,
            heads=m.num_heads if transformer else 0,
            kv_heads=m.num_kv_heads if transformer else 0,
            microbatch=job.microbatch,
            sequence_length=job.sequence_length,
            tensor=job.tensor,
            sequence=job.sequence and job.tensor > 1,
            context=job.context,
            recompute=job.recompute,
            precision=job.precision,
            attention=job.attention,
            kernels=job.kernels,
            software=job.software,
        )


@dataclass(frozen=True)
class Finding:
    """What one run says."""

    source: str
    """The run, its GPUs and layout."""
    gpu: str
    shape: Shape
    time_factor: float
    """Measured over planned seconds a step."""
    memory_offset: float
    """Bytes of the first rank, measured less planned."""


class Correction(NamedTuple):
    """Of one job."""

    time_factor: float
    runs: int
    """That it is from; 0 where none was on this GPU with this software."""
    same_shape: bool
    """Whether they worked on the job's shapes."""


@dataclass(frozen=True)
class Calibration:
    """What measured runs say, together."""

    findings: tuple[Finding, ...] = ()

    def correction(self, job: Job, gpu: str) -> Correction:
        """The median of the runs with the job's shapes on this GPU; without one, of all there with its software."""
        if not self.findings:
            return Correction(1.0, 0, False)
        if same := self._factors.get((gpu, Shape.of(job))):
            return Correction(_middle(same), len(same), True)
        like = self._of_software.get((gpu, job.software), ())
        return Correction(_middle(like) if like else 1.0, len(like), False)

    def time(self, job: Job, cluster: Cluster, constants: Constants | None = None) -> StepTime:
        """The planned step time of a job, corrected."""
        step = time_of(job, cluster, constants)
        factor = self.correction(job, cluster.gpu.name).time_factor
        return step if factor == 1 else step.times(factor)

    def memory_offset(self, gpu: str) -> float:
        """Bytes, the median of the runs on this GPU; 0 without one."""
        return statistics.median([f.memory_offset for f in self.findings if f.gpu == gpu] or [0.0])

    @functools.cached_property
    def _factors(self) -> dict[tuple[str, Shape], list[float]]:
        found = defaultdict(list)
        for f in self.findings:
            found[f.gpu, f.shape].append(f.time_factor)
        return dict(found)

    @functools.cached_property
    def _of_software(self) -> dict[tuple[str, str], list[float]]:
        found = defaultdict(list)
        for f in self.findings:
            found[f.gpu, f.shape.software].append(f.time_factor)
        return dict(found)


NEUTRAL = Calibration()


def _middle(factors: list[float]) -> float:
    return math.exp(statistics.median(map(math.log, factors)))


def save(calibration: Calibration, path: Path) -> None:
    """Write it as TOML. Raises UserError when the file cannot be written."""
    lines = ["# Written by `bigtrain plan --calibrate`; use it with --calibration."]
    for finding in calibration.findings:
        told = asdict(finding)
        shape = told.pop("shape")
        lines += ["", "[[run]]", *_assigned(told), "[run.shape]", *_assigned(shape)]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot write: {e.strerror}", where=str(path), do="give another --out") from e


def _assigned(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


def read(path: Path) -> Calibration:
    """Read what `save` wrote. Raises UserError for anything else."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        found = tuple(_finding(run) for run in raw["run"])
    except OSError as e:
        raise UserError(f"cannot read: {e.strerror}", where=str(path), do="check the path") from e
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(
            f"is no calibration: {type(e).__name__} {e}",
            where=str(path),
            do="write one with `bigtrain plan --calibrate RUN`",
        ) from e
    for finding in found:
        if not (0 < finding.time_factor < math.inf and math.isfinite(finding.memory_offset)):
            raise UserError(
                f"has a time_factor that is not above 0, of {finding.source!r}",
                where=str(path),
                do="calibrate again",
            )
    return Calibration(found)


def _finding(run: Mapping[str, Any]) -> Finding:
    kinds = {"str": str, "int": int, "bool": bool}
    shape = {f.name: run["shape"][f.name] for f in fields(Shape)}
    for f in fields(Shape):
        if type(shape[f.name]) is not kinds[str(f.type)]:
            raise TypeError(f"shape.{f.name} = {shape[f.name]!r} is not of type {f.type}")
    return Finding(
        source=str(run["source"]),
        gpu=str(run["gpu"]),
        shape=Shape(**shape),
        time_factor=float(run["time_factor"]),
        memory_offset=float(run["memory_offset"]),
    )
