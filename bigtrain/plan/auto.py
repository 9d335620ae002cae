"""`layout = "auto"`: the layout of a run, chosen on each of its ranks before they meet, the same on all.

The choice is a function of the config, the number of ranks and the kind of their GPUs. A resumed run keeps the
layout of its last attempt as long as the number of ranks is the same, so that its bits stay the same too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from bigtrain.config import Config
from bigtrain.configfile import load
from bigtrain.errors import UserError
from bigtrain.grid import world_problems
from bigtrain.place import Place
from bigtrain.plan.hardware import Cluster, Gpu, Network, cluster_of, find_gpu
from bigtrain.plan.job import job_of
from bigtrain.plan.search import described, search, with_layout

CPU = Gpu(
    name="CPU",
    memory_gib=math.inf,
    peak_tflops={"fp32": 0.1, "bf16": 0.1, "fp16": 0.1, "fp8": 0.1},
    bandwidth_gb_s=20.0,
    link_gb_s=5.0,
    per_node=1,
)
"""A few cores. The figures are fixed, whatever the machine: every rank must come to the same layout."""


def choose(config: Config, place: Place, run: Path, *, fresh: bool = False) -> tuple[Config, str]:
    """The config with a layout for the ranks of `place`, and a line that tells which and why.

    `run` is the run directory: the layout of an attempt there with as many ranks is kept, unless `fresh`. One CPU
    process needs none. Raises UserError when no layout fits the GPUs.
    """
    gpu = _gpu()
    if place.world == 1 and gpu is None:
        return config, "layout auto: one process, nothing to lay out"
    if config.model.kind == "lstm":
        return config, "layout auto: an lstm runs data-parallel"
    former = None if fresh else _former(config, place.world, run)
    if former is not None:
        job = job_of(former, place.world)
        return former, f"layout auto: {described(job)}, as in the last attempt on {place.world} ranks"
    cluster = _cluster(gpu, place)
    found = search(config, cluster)
    if not found.best:
        least = found.smallest
        assert least is not None, "where nothing fits, one is smallest"
        need = f"needs {least.bytes / 2**30:.1f} GiB a rank ({described(least.job)})"
        raise UserError(
            f"no layout fits {place.world} x {cluster.gpu.name} ({cluster.gpu.memory_gib:.0f} GiB): the least {need}",
            where='layout = "auto"',
            do="start more ranks, or shorten data.sequence_length; `bigtrain plan CONFIG` tells how many would do",
        )
    best = found.best[0]
    told = f"{best.time.total:.3g} s a step planned" if gpu is not None else "no GPU is seen"
    note = f"layout auto: {described(best.job)} on {place.world} x {cluster.gpu.name}, {told}"
    return with_layout(config, best.job), note


def _former(config: Config, world: int, run: Path) -> Config | None:
    """The config with the layout of the last attempt in this run directory, if it was on so many ranks and fits."""
    try:
        attempts = json.loads((run / "provenance.json").read_text())["attempts"]
        last = load(run / "config.toml")
    except (OSError, ValueError, KeyError, UserError):
        return None  # no run here; one that is damaged is reported by RunDir
    if not attempts or attempts[-1].get("world") != world:
        return None
    train = config.train.model_copy(update={"microbatch": last.train.microbatch})
    kept = config.model_copy(update={"layout": last.layout, "train": train})
    return None if any(world_problems(kept, world)) else kept


def _gpu() -> Gpu | None:
    """The kind of this machine's first GPU; None without one. Raises UserError for one that is not in the table."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    try:
        return find_gpu(name)
    except UserError as e:
        do = "write a [layout] instead (`bigtrain plan CONFIG --hardware FILE` can help to find one)"
        raise UserError(f"the planner does not know {name!r}", where='layout = "auto"', do=do) from e


def _cluster(gpu: Gpu | None, place: Place) -> Cluster:
    """The ranks' machines, as many ranks on each as on this one."""
    if gpu is None:
        return Cluster(CPU, place.world, place.local_world, Network("local", gb_s=1.0, latency_us=50.0))
    return dataclasses.replace(cluster_of(gpu.name, place.world), gpu=gpu, per_node=place.local_world)
