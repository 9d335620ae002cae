"""The search's arithmetic against the checks that a run makes, and its choice against trying everything."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from bigtrain.config import Config, LayoutConfig, layout_problems
from bigtrain.configfile import find_config, load
from bigtrain.errors import UserError
from bigtrain.grid import world_problems
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import job_of
from bigtrain.plan.memory import memory_of
from bigtrain.plan.search import (
    MOST_CHUNKS,
    RECOMPUTE,
    Rules,
    base_job,
    described,
    fullest,
    layouts,
    search,
    why_slower,
    with_layout,
)
from bigtrain.plan.steptime import PARTS, time_of
from tests.test_config import small

MODELS: list[dict[str, Any]] = [
    {"heads": 8, "kv_heads": 2, "layers": 6, "width": 64},
    {"heads": 12, "kv_heads": 4, "layers": 5, "width": 96},
    {"heads": 6, "kv_heads": 6, "layers": 8, "width": 48},
    {"kind": "lstm", "heads": None},
]
SCHEDULES = ("1f1b", "gpipe", "interleaved", "interleaved-zb", "zbv")


def random_case(rng: random.Random) -> tuple[Config, int]:
    """A model, a batch and a layout: some legal, most not."""
    schedule = rng.choice(SCHEDULES)
    layout = {
        "tensor": rng.choice([1, 1, 2, 3, 4, 6, 8]),
        "pipeline": rng.choice([1, 1, 2, 3, 4, 8]),
        "context": rng.choice([1, 1, 2, 3, 4]),
        "context_by": rng.choice(["gather", "ulysses"]),
        "schedule": schedule,
        "chunks": rng.choice([1, 2, 2, 3] if schedule not in ("1f1b", "gpipe") else [1, 1, 1, 2]),
        "zero": rng.choice([0, 1, 2, 3]),
        "sequence": rng.choice([True, True, False]),
        "offload": rng.choice(["none", "none", "optimizer"]),
    }
    train = {"global_batch": rng.choice([12, 16, 24, 48]), "microbatch": rng.choice([1, 2, 3])}
    if rng.random() < 0.2:
        train |= {"batch_ramp_from": 4, "batch_ramp_steps": 2}
    data = {"sequence_length": rng.choice([16, 24, 36])}
    optim = {"kind": rng.choice(["adamw", "adamw", "muon"])}
    config = small(model=rng.choice(MODELS), train=train, data=data, optim=optim, layout=layout)
    each = config.layout.tensor * config.layout.pipeline * config.layout.context
    return config, max(2, each * rng.choice([1, 1, 2, 3]) + (rng.random() < 0.1))


def as_job(config: Config, world: int) -> Any:
    """The job of a layout that need not be legal."""
    layout = config.layout
    keys = (
        "tensor",
        "sequence",
        "pipeline",
        "schedule",
        "chunks",
        "context",
        "context_by",
        "zero",
        "recompute",
    )
    given = {key: getattr(layout, key) for key in keys}
    base = vars(base_job(config)) | given | {"microbatch": config.train.microbatch}
    each = layout.tensor * layout.pipeline * layout.context
    return type(base_job(config))(**{**base, "data": world // each, "offload": layout.offload == "optimizer"})


def test_the_fast_rules_agree_with_the_checks_of_a_run() -> None:
    rng = random.Random(1)
    counts = {True: 0, False: 0}
    for _ in range(6000):
        config, world = random_case(rng)
        problems = [*layout_problems(config), *world_problems(config, world)]
        rules = Rules.of(config, world, offload=config.layout.offload == "optimizer")
        allowed = rules.allows(as_job(config, world))
        assert allowed == (not problems), (config, world, problems)
        counts[allowed] += 1
    assert min(counts.values()) > 200, counts


@pytest.mark.parametrize("world", [2, 6, 8, 24])
def test_every_layout_listed_is_legal_and_none_is_missing(world: int) -> None:
    config = small(model=MODELS[0], train={"global_batch": 24}, data={"sequence_length": 24})
    listed = list(layouts(base_job(config), Rules.of(config, world, offload=False)))
    assert len(listed) == len(set(listed))
    for job in listed:
        laid = with_layout(config, job)
        assert not [*layout_problems(laid), *world_problems(laid, world)]
        assert job_of(laid, world) == job
    # By trying all there are, apart from those that are never better (see `layouts`).
    found = 0
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    kinds = [(s, c) for s in SCHEDULES if s != "gpipe" for c in range(1, MOST_CHUNKS + 1)]
    for t, p, c in ((t, p, c) for t in sizes for p in sizes for c in sizes if world % (t * p * c) == 0):
        for by in ("gather", "ulysses") if c > 1 else ("gather",):
            for schedule, chunks in kinds if p > 1 else [("1f1b", 1)]:
                for zero in (z for z in range(4) if p == 1 or z != 2):
                    for microbatch in range(1, 25):
                        axes = {"tensor": t, "pipeline": p, "context": c, "context_by": by, "zero": zero}
                        tried = LayoutConfig(**axes, schedule=schedule, chunks=chunks)
                        laid = config.model_copy(
                            update={
                                "layout": tried,
                                "train": config.train.model_copy(update={"microbatch": microbatch}),
                            }
                        )
                        plain = laid.model_copy(
                            update={"layout": tried.model_copy(update={"sequence": False})}
                        )
                        few = 24 // (microbatch * (world // (t * p * c)))
                        if few < {"1f1b": 1, "zbv": 2 * p - 1}.get(schedule, p):
                            continue
                        legal = (not [*layout_problems(x), *world_problems(x, world)] for x in (laid, plain))
                        found += any(legal)
    assert len(listed) == 3 * found  # each with three kinds of recomputation


def test_the_best_is_the_fastest_that_fits() -> None:
    config = load(find_config("llama-8b"))
    cluster = cluster_of("h100", 16)
    found = search(config, cluster, few=3)
    capacity = cluster.gpu.memory_gib * 2**30
    everything = list(layouts(base_job(config), Rules.of(config, 16, offload=False)))
    assert found.tried == len(everything)
    fitting = [job for job in everything if fullest(job) <= capacity]
    fastest: dict[tuple[int, int, int], float] = {}
    for job in fitting:
        axes = (job.tensor, job.pipeline, job.context)
        fastest[axes] = min(fastest.get(axes, math.inf), time_of(job, cluster).total)
    best = found.best[0]
    assert [b.time.total for b in found.best] == pytest.approx(sorted(fastest.values())[:3], rel=2e-6)
    assert max(s.high for s in memory_of(best.job)) == best.bytes <= capacity
    assert len({(b.job.tensor, b.job.pipeline, b.job.context) for b in found.best}) == 3
    for layout in found.too_large:
        assert layout.bytes > capacity
        assert layout.time.total < best.time.total
    assert found.smallest is None


@pytest.mark.parametrize("name", ["llama-8b", "gpt2-124m"])
def test_recomputing_more_never_makes_a_step_faster_or_larger(name: str) -> None:
    """On which the search relies."""
    config, cluster = load(find_config(name)), cluster_of("h100", 8)
    listed = list(layouts(base_job(config), Rules.of(config, 8, offload=False), recompute=("none",)))
    for job in random.Random(2).sample(listed, 200):
        kinds = [replace(job, recompute=recompute) for recompute in RECOMPUTE]
        times, sizes = [time_of(kind, cluster).total for kind in kinds], [fullest(kind) for kind in kinds]
        assert times == pytest.approx(sorted(times), rel=1e-9)
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("name", "world"), [("llama-8b", 32), ("gpt2-124m", 12), ("llama-70b", 96)])
def test_one_of_three_stages_is_the_fullest(name: str, world: int) -> None:
    config = load(find_config(name), ["train.global_batch_tokens=none", "train.global_batch=96"])
    listed = list(layouts(base_job(config), Rules.of(config, world, offload=False)))
    pipelines = [job for job in listed if job.pipeline > 3]
    for job in random.Random(3).sample(pipelines, 400):
        assert fullest(job) == max(stage.high for stage in memory_of(job)), described(job)


def test_a_quick_search_tries_some_of_them() -> None:
    config = load(find_config("llama-8b"))
    base, rules = base_job(config), Rules.of(config, 64, offload=False)
    few, every = set(layouts(base, rules, quick=True)), set(layouts(base, rules))
    assert few < every
    assert len(every) > 20 * len(few)


def test_the_choice_is_the_same_every_time() -> None:
    config, cluster = load(find_config("llama-1b")), cluster_of("h100", 16)
    assert search(config, cluster, quick=True).best == search(config, cluster, quick=True).best


def test_what_does_not_fit_goes_to_host_memory() -> None:
    """The optimizer state of 13B on one node's worth of two GPUs: 12 bytes a parameter, 78 GB a GPU."""
    found = search(load(find_config("llama-13b")), cluster_of("h100", 2))
    if found.best:
        assert found.offload
        assert all(layout.job.offload for layout in found.best)
    else:
        assert found.smallest is not None
        assert found.smallest.bytes > found.capacity


def test_a_model_beyond_the_cluster_says_how_far() -> None:
    config, cluster = load(find_config("llama-405b")), cluster_of("h100", 8)
    found = search(config, cluster, quick=True)
    assert not found.best
    assert found.smallest is not None
    every = layouts(base_job(config), Rules.of(config, 8, offload=False), quick=True)
    assert found.smallest.bytes == min(fullest(job) for job in every)
    assert found.smallest.bytes > 2 * found.capacity


def test_one_process_chooses_microbatch_and_recomputation() -> None:
    found = search(load(find_config("gpt2-124m")), cluster_of("h100", 1))
    job = found.best[0].job
    assert job.ranks == 1
    assert found.tried > 5


def test_no_layout_at_all_is_an_error_that_names_a_number_that_works() -> None:
    config = small(model=MODELS[0], train={"global_batch": 8})
    with pytest.raises(UserError, match="no layout runs on 7 ranks") as caught:
        search(config, cluster_of("h100", 7))
    assert "use 6 ranks" in str(caught.value)
    with pytest.raises(UserError, match="lstm runs data-parallel only"):
        search(small(model=MODELS[3]), cluster_of("h100", 3))


def test_why_the_runner_up_loses() -> None:
    config, cluster = load(find_config("llama-70b")), cluster_of("h100", 64)
    best, second, *_ = search(config, cluster, quick=True).best
    why = why_slower(second.time, best.time)
    more = {part: getattr(second.time, part) - getattr(best.time, part) for part in PARTS}
    assert sum(more.values()) == pytest.approx(second.time.total - best.time.total)
    assert why.startswith(max(PARTS, key=lambda part: more[part]))


def test_described_names_every_axis() -> None:
    layout = {
        "tensor": 2,
        "pipeline": 3,
        "schedule": "interleaved",
        "chunks": 2,
        "context": 2,
        "recompute": "full",
    }
    config = small(model=MODELS[0], train={"global_batch": 24}, data={"sequence_length": 24}, layout=layout)
    text = "pipeline 3 x data 2 x context 2 x tensor 2, interleaved of 2 chunks, context by gather, ZeRO 1"
    assert described(job_of(config, 24)) == f"{text}, recompute full, microbatch 2"
