"""The time of a step from executed work: streams on a clock, and what a dry run of the real code comes to."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from bigtrain.config import Config, ModelConfig
from bigtrain.parallel.schedule import Action, bubble_formula
from bigtrain.plan.constants import CONSTANTS
from bigtrain.plan.dryrun import DryRun, StageRun, dry_run
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import Job, job_of
from bigtrain.plan.measuring import Step
from bigtrain.plan.oplog import Compute, Item, Mark, Wait, Work
from bigtrain.plan.replay import Charges, replay
from bigtrain.plan.steptime import time_of
from bigtrain.plan.traffic import Sent

MODEL = ModelConfig(vocab_size=32000, layers=4, width=2048, heads=16, kv_heads=4, max_length=2048)
JOB = Job(MODEL, sequence_length=2048, global_batch=8, microbatch=1, data=8, zero=0)
CLUSTER = cluster_of("h100", 8)
PLAIN = replace(CONSTANTS, hidden=1.0, fixed=0.0, straggle=0.0, launch=0.0)
WORK = Compute("add", 0, 3_000_000_000)
"""About a millisecond of memory traffic."""
ROUND = Sent("data", "all-reduce", 3e8, 2e8, 8, 1, False)


def stage(*items: Item, microbatches: int = 1) -> StageRun:
    """A stage that does these things."""
    table = list(dict.fromkeys(items))
    step = Step(microbatches, 0, [], Work(0, 0, 0, {}), array("I", [table.index(i) for i in items]))
    return StageRun(0, 0, 0, {}, [], 0, 0, 0, 0, 0, {}, (step,), table)


def run_of(*stages: StageRun, microbatches: int = 1) -> DryRun:
    nothing: Any = None
    return DryRun(nothing, nothing, microbatches, microbatches, list(stages), 0.0)


def parts_of(*items: Item) -> dict[str, float]:
    """Without a floor of launches."""
    return replay(run_of(stage(*items)), JOB, CLUSTER, PLAIN).parts


def test_what_is_waited_for_at_once_is_exposed_and_what_is_not_hides() -> None:
    charges = Charges(JOB, CLUSTER, PLAIN)
    work, sent = charges.compute(WORK), charges.sent(ROUND)
    assert 0 < sent < work
    at_once = parts_of(WORK, ROUND, Wait(1), WORK)
    assert at_once["compute"] == pytest.approx(2 * work)
    assert at_once["data"] == pytest.approx(sent)
    beside = parts_of(WORK, ROUND, WORK, Wait(1))
    assert beside["data"] == pytest.approx(0.0)
    never = parts_of(WORK, ROUND, WORK)
    assert never == beside
    two = parts_of(ROUND, ROUND, ROUND, Wait(1))  # one stream: they queue
    assert two["data"] == pytest.approx(3 * sent)
    first = parts_of(ROUND, ROUND, ROUND, Wait(3))
    assert first["data"] == pytest.approx(sent)
    other = ROUND._replace(axis="tensor")
    assert parts_of(ROUND, other, Wait(1), Wait(2))["data"] == pytest.approx(0.0), (
        "axes do not wait for each other"
    )


def test_zero_3_reduces_on_a_stream_of_its_own() -> None:
    """A CPU waits for it at once, and so says the log; a GPU for the third but one, and before the update."""
    job = replace(JOB, zero=3)
    sent = Sent("data", "reduce-scatter", 3e8, 2e8, 8, 1, True)
    one = Charges(job, CLUSTER, PLAIN).sent(sent)

    def exposed(*items: Item, job: Job = job) -> float:
        return replay(run_of(stage(*items)), job, CLUSTER, PLAIN).parts.get("data", 0.0)

    both = (sent, Wait(1))
    assert exposed(*both, WORK) == pytest.approx(0.0)
    assert exposed(*both, WORK, job=replace(job, zero=2)) == pytest.approx(one)
    assert exposed(WORK, *both) == pytest.approx(one), "nothing comes after it"
    assert exposed(*both, *both, *both) == pytest.approx(3 * one)
    assert exposed(*both, *both, *both, WORK, WORK) == pytest.approx(one), "two at the most are under way"
    assert exposed(*both, Compute("_fused_adamw_", 0, 10**9), WORK) == pytest.approx(one)


def test_communication_beside_compute_slows_it() -> None:
    charges = Charges(JOB, CLUSTER, CONSTANTS)
    sent = charges.sent(ROUND)
    found = replay(
        run_of(stage(ROUND, WORK, Wait(1))), JOB, CLUSTER, replace(PLAIN, hidden=CONSTANTS.hidden)
    ).parts
    assert found["data"] == pytest.approx((1 - CONSTANTS.hidden) * sent)


def test_a_product_is_charged_by_its_size() -> None:
    charges = Charges(JOB, CLUSTER)
    large = Compute("mm", 2 * 8192**3, 3 * 2 * 8192**2, (8192, 8192, 8192, 1))
    thin = Compute("mm", 2 * 8192**2 * 32, 2 * 8192**2, (8192, 32, 8192, 1))
    peak = CLUSTER.gpu.flops("bf16")
    assert 0.5 < large.flops / peak / charges.compute(large) < 0.85
    assert thin.flops / peak / charges.compute(thin) < 0.3
    odd = large._replace(dims=(8192, 8192, 8191, 1))
    assert charges.compute(odd) > 1.5 * charges.compute(large)


def test_a_pipeline_runs_its_schedule() -> None:
    """Two equal stages of 1F1B: the bubble is the formula's, and the update comes once."""
    job = replace(JOB, pipeline=2, data=4, global_batch=32)
    n = job.microbatches
    forward, backward = WORK, Compute("add", 0, 6_000_000_000)

    def of(rank: int) -> StageRun:
        items: list[Item] = []
        for m in range(3):
            items += [Mark(Action("F", rank, m)), forward, Mark(Action("B", rank, m)), backward]
        return stage(*items, Mark(None), Compute("_fused_adamw_", 0, 10**9), microbatches=3)

    found = replay(run_of(of(0), of(1), microbatches=n), job, CLUSTER, PLAIN)
    one = Charges(job, CLUSTER, PLAIN).compute
    busy = n * (one(forward) + one(backward))
    assert found.parts["compute"] == pytest.approx(busy)
    assert found.parts["bubble"] == pytest.approx(bubble_formula("1f1b", 2, 1, n) * busy)
    assert found.parts["optimizer"] == pytest.approx(one(Compute("_fused_adamw_", 0, 10**9)))
    assert found.total == pytest.approx(sum(found.parts.values()))


def config(layout: dict[str, Any], *, batch: int = 32) -> Config:
    model = {"vocab_size": 32000, "layers": 4, "width": 4096, "heads": 32, "kv_heads": 8, "max_length": 4096}
    return Config.model_validate(
        {
            "name": "small",
            "model": model,
            "data": {"path": "nowhere", "sequence_length": 4096},
            "train": {"steps": 10, "global_batch": batch, "microbatch": 1, "precision": "bf16"},
            "layout": layout,
        }
    )


@cache
def executed(layout: tuple[tuple[str, Any], ...], whole: bool = False) -> DryRun:
    return dry_run(config(dict(layout)), 8, whole=whole)


def test_a_few_microbatches_tell_the_time_of_all() -> None:
    layout = (("zero", 1),)
    c = config(dict(layout))
    some, every = (replay(executed(layout, whole), job_of(c, 8), CLUSTER) for whole in (False, True))
    assert some.total == pytest.approx(every.total, rel=1e-6)
    assert some.parts == pytest.approx(every.parts, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "layout",
    [
        {"zero": 0},
        {"zero": 1, "recompute": "full"},
        {"zero": 3},
        {"zero": 1, "tensor": 2},
        {"zero": 1, "context": 2, "context_by": "ulysses"},
        {"zero": 2},
        {"zero": 1, "context": 4},
        {"zero": 3, "context": 4},
        {"zero": 1, "pipeline": 2},
        {"zero": 1, "pipeline": 2, "schedule": "zbv", "chunks": 2},
    ],
    ids=str,
)
def test_the_formulas_come_to_the_same(layout: dict[str, Any]) -> None:
    """They were 0.2 to 4.2 % apart; what is left are messages that queue."""
    job = job_of(config(layout), 8)
    again, planned = replay(executed(tuple(layout.items())), job, CLUSTER), time_of(job, CLUSTER)
    assert planned.total == pytest.approx(again.total, rel=0.05), again
    assert planned.compute == pytest.approx(again.parts["compute"], rel=0.05)
    for name in {"tensor", "context"} & layout.keys():
        assert again.parts[name] == pytest.approx(getattr(planned, name), rel=0.35)


def test_recomputation_is_in_the_work() -> None:
    none, full = (
        replay(executed(layout), job_of(config(dict(layout)), 8), CLUSTER).parts["compute"]
        for layout in ((("zero", 1),), (("zero", 1), ("recompute", "full")))
    )
    assert 1.15 < full / none < 1.34, "the head is not computed again"


def test_parts_are_of_known_axes() -> None:
    known = {
        "compute",
        "optimizer",
        "fixed",
        "bubble",
        "data",
        "replica",
        "tensor",
        "context",
        "pipeline",
        "model",
    }
    assert Counter(replay(executed((("zero", 1),)), JOB, CLUSTER).parts).keys() <= known | {
        "world",
        "ends",
        "heads",
    }
