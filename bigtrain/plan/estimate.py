"""One job on one cluster, in numbers: what it takes, how long, how much, each from the planner's models."""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.budget import BatchSchedule, Progress
from bigtrain.config import Config
from bigtrain.plan.calibration import NEUTRAL, Calibration, Correction
from bigtrain.plan.constants import Constants
from bigtrain.plan.flops import Flops, flops_per_token, non_embedding_parameters, parameters
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.interval import SavePlan, save_plan
from bigtrain.plan.job import Job
from bigtrain.plan.memory import StageMemory, memory_of
from bigtrain.plan.steptime import StepTime, time_of


@dataclass(frozen=True)
class Range:
    """An estimate and the interval that should hold the truth."""

    point: float
    low: float
    high: float

    def times(self, factor: float) -> Range:
        """Of a quantity proportional to this one."""
        return Range(self.point * factor, self.low * factor, self.high * factor)

    def under(self, amount: float) -> Range:
        """`amount` divided by this."""
        return Range(amount / self.point, amount / self.high, amount / self.low)


@dataclass(frozen=True)
class Estimate:
    """What a run takes. All memory in bytes, all times in seconds."""

    config: Config
    job: Job
    cluster: Cluster
    parameters: int
    inner: int
    """Parameters without embeddings."""
    flops: Flops
    stages: list[StageMemory]
    memory: list[Range]
    """Of every pipeline stage, with the calibration's offset."""
    time: StepTime
    """By the model alone, not calibrated."""
    step: Range
    """Seconds a step, calibrated."""
    tokens: int
    """Of the whole run."""
    steps: int
    saves: SavePlan
    price: float | None
    """Of a GPU-hour."""
    calibration: Calibration

    @property
    def correction(self) -> Correction:
        """Of the step time, by measured runs."""
        return self.calibration.correction(self.job, self.cluster.gpu.name)

    @property
    def capacity(self) -> float:
        """Bytes of one card."""
        return self.cluster.gpu.memory_gib * 2**30

    @property
    def fits(self) -> bool:
        """By the point estimate; `surely_fits` by the upper end of the interval."""
        return max(m.point for m in self.memory) <= self.capacity

    @property
    def surely_fits(self) -> bool:
        """Even at the upper end of the interval."""
        return max(m.high for m in self.memory) <= self.capacity

    @property
    def speed(self) -> Range:
        """Tokens/s a GPU."""
        return self.step.under(self.job.tokens_per_step / self.cluster.gpus)

    @property
    def training(self) -> Range:
        """Seconds of the run without failures, saves and evaluations."""
        return self.step.times(self.steps)

    @property
    def wall(self) -> Range:
        """Seconds with saves, repeated work and restarts."""
        return self.training.times(1 / self.saves.goodput)

    @property
    def gpu_hours(self) -> Range:
        """Of the whole run."""
        return self.wall.times(self.cluster.gpus / 3600)

    @property
    def cost(self) -> Range | None:
        """In the currency of the price."""
        return None if self.price is None else self.gpu_hours.times(self.price)

    def utilisation(self, kind: str) -> Range:
        """ "mfu", "hfu" or "visible" (the MFU that counts only the keys a query sees), calibrated."""
        share = self.time.hfu if kind == "hfu" else self.time.mfu
        if kind == "visible":
            share *= self.flops.training_visible / self.flops.training
        return self.step.under(share * self.time.total)


def estimate(
    config: Config,
    job: Job,
    cluster: Cluster,
    *,
    tokens: int | None = None,
    price: float | None = None,
    constants: Constants | None = None,
    calibration: Calibration = NEUTRAL,
) -> Estimate:
    """Plan `config` laid out as `job` on `cluster`. `tokens` in place of the config's own budget."""
    batches = BatchSchedule.of(config)
    if tokens is None:
        steps = batches.total_steps(config, Progress())
        tokens = batches.ahead(Progress(), steps).tokens
    else:
        steps = -(-tokens // job.tokens_per_step)
    time, stages = time_of(job, cluster, constants), memory_of(job)
    more, correction = (
        calibration.memory_offset(cluster.gpu.name),
        calibration.correction(job, cluster.gpu.name),
    )
    return Estimate(
        config=config,
        job=job,
        cluster=cluster,
        parameters=parameters(config.model),
        inner=non_embedding_parameters(config.model),
        flops=flops_per_token(config.model, job.sequence_length),
        stages=stages,
        memory=[Range(s.total + more, s.low + more, s.high + more) for s in stages],
        time=time,
        step=Range(time.total, time.low, time.high).times(correction.time_factor),
        tokens=tokens,
        steps=steps,
        saves=saves_of(config, cluster),
        price=price,
        calibration=calibration,
    )


def saves_of(config: Config, cluster: Cluster) -> SavePlan:
    """The save interval of a config on a cluster."""
    size = parameters(config.model) * 4.0 * (1 + moments(config))
    return save_plan(size, cluster.gpus, cluster.nodes, asynchronous=config.checkpoint.asynchronous)


def moments(config: Config) -> float:
    """Moments kept a parameter: AdamW 2; Muon 1 for matrices and 2 for the rest; SGD 1 with momentum, else 0."""
    inner = non_embedding_parameters(config.model) / parameters(config.model)
    return {"adamw": 2.0, "muon": 2.0 - inner, "sgd": float(config.optim.momentum > 0)}[config.optim.kind]
