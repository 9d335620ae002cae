"""Predicted against measured: what a run says about the planner."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.config import Config
from bigtrain.errors import UserError
from bigtrain.plan.calibration import Finding, Shape
from bigtrain.plan.hardware import Cluster, cluster_of
from bigtrain.plan.job import job_of
from bigtrain.plan.memory import memory_of
from bigtrain.plan.quantities import gibibytes, span
from bigtrain.plan.steptime import time_of

WARM_UP = 5
"""Steps at the start of an attempt that do not count: compilation, first use of memory and connections."""


@dataclass(frozen=True)
class Measured:
    """What a run's metrics say."""

    seconds: float
    """Median of the steps that count."""
    memory: float
    """Most bytes allocated on rank 0's GPU."""
    steps: int
    """That count."""


def measured(records: Iterable[Mapping[str, Any]], tokens_per_step: int) -> Measured | None:
    """From the records of metrics.jsonl; None when there is no step of this size after the warm-up.

    Steps of another size (a rising batch) do not count, nor does the first one after each restart.
    """
    steps = [r for r in records if r["kind"] == "step"]
    counted: list[Mapping[str, Any]] = []
    for before, record in itertools.pairwise(steps):
        size = record["tokens"] - before["tokens"]
        paused = record["time"] - before["time"] > 3 * record["seconds"] + 60  # a restart lies between
        if size == tokens_per_step and record["step"] > WARM_UP and not paused:
            counted.append(record)
    if not counted:
        return None
    return Measured(
        seconds=statistics.median(r["seconds"] for r in counted),
        memory=max(r["memory_bytes"] for r in counted),
        steps=len(counted),
    )


@dataclass(frozen=True)
class Comparison:
    """A run's step time and memory beside the planner's."""

    measured: Measured
    seconds: float
    low: float
    high: float
    """Planned, with its interval."""
    memory: float
    """Planned for rank 0, without what the GPU keeps outside tensors, which the run does not see either."""
    finding: Finding

    def __str__(self) -> str:
        m = self.measured
        inside = "inside" if self.low <= m.seconds <= self.high else "outside"
        return "\n".join(
            [
                f"step time       {span(m.seconds)} measured (median of {m.steps:,}), {span(self.seconds)} planned "
                f"({m.seconds / self.seconds - 1:+.1%}; {inside} {span(self.low)} to {span(self.high)})",
                f"memory, rank 0  {gibibytes(m.memory)} measured, {gibibytes(self.memory)} planned "
                f"({m.memory / self.memory - 1:+.1%}, tensors only)",
            ]
        )


def compare(
    config: Config, cluster: Cluster, records: Iterable[Mapping[str, Any]], source: str = ""
) -> Comparison | None:
    """Plan a run that was, and compare; None when too little of it is recorded. `cluster` is what it ran on."""
    job = job_of(config, cluster.gpus)
    found = measured(records, job.tokens_per_step)
    if found is None:
        return None
    time, first = time_of(job, cluster), memory_of(job)[0]
    memory = first.total - first.unseen
    finding = Finding(
        source=source,
        gpu=cluster.gpu.name,
        shape=Shape.of(job),
        time_factor=found.seconds / time.total,
        memory_offset=found.memory - memory,
    )
    return Comparison(found, time.total, time.low, time.high, memory, finding)


def cluster_of_run(run: Path, network: str | None = None, extra: Path | None = None) -> Cluster:
    """What the last attempt of a run ran on. Raises UserError of CPUs, of cards that are not known, and of no run."""
    try:
        last = json.loads((run / "provenance.json").read_text(encoding="utf-8"))["attempts"][-1]
        world, hosts, name = int(last["world"]), len(last["hosts"]), last["hardware"].get("gpu")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
        raise UserError(
            "tells not where it ran", where=str(run / "provenance.json"), do="give a run of bigtrain train"
        ) from e
    if name is None:
        raise UserError(
            "ran on CPUs, which the planner has no model of", where=str(run), do="give a run on GPUs"
        )
    return replace(cluster_of(name, world, network, extra), per_node=-(-world // hosts))


def beside_plan(
    config: Config, device_name: str, world: int, per_node: int, records: Iterable[Mapping[str, Any]]
) -> str:
    """What `compare` says of a run on `world` GPUs that torch calls `device_name`; "" for GPUs that are not known."""
    try:
        cluster = replace(cluster_of(device_name, world), per_node=per_node)
    except UserError:
        return ""
    found = compare(config, cluster, records)
    return "" if found is None else str(found)
