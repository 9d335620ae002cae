"""How far the plan's formulas are from the executed code: memory and step time, plan over dry run, less 1, in per cent.

python -m benchmarks.dryrun [--out benchmarks/results/dryrun.json]

No speed is measured and no GPU is asked: both are the planner's, one by formulas for a layer, the other from what the
code of one rank a stage does with fake tensors, put on the clock by the same constants.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import date
from pathlib import Path
from typing import Any

from bigtrain.configfile import find_config, load
from bigtrain.plan.checked import checks
from bigtrain.plan.dryrun import dry_run
from bigtrain.plan.estimate import estimate
from bigtrain.plan.hardware import cluster_of
from bigtrain.plan.job import job_of
from bigtrain.plan.replay import replay

CASES: tuple[tuple[str, int, str], ...] = (
    ("llama-8b", 8, "zero=1"),
    ("llama-8b", 8, "zero=2"),
    ("llama-8b", 8, "zero=3"),
    ("llama-8b", 64, "zero=2"),
    ("llama-8b", 64, "zero=1 tensor=8"),
    ("llama-8b", 64, "zero=1 tensor=2 context=4"),
    ("llama-8b", 64, 'zero=2 tensor=4 context=4 context_by="ulysses"'),
    ("llama-8b", 64, "zero=3 context=8"),
    ("llama-8b", 64, "tensor=2 pipeline=4"),
    ("llama-8b", 64, 'tensor=2 pipeline=4 schedule="zbv" chunks=2 zero=0'),
    ("llama-8b", 64, 'tensor=4 pipeline=4 schedule="interleaved" chunks=2'),
    ("llama-8b", 64, 'tensor=4 recompute="full"'),
    ("llama-8b", 64, 'tensor=4 recompute="selective"'),
    ("llama-1b", 8, "zero=0"),
    ("llama-1b", 8, "zero=2"),
    ("llama-1b", 8, 'pipeline=4 schedule="zbv" chunks=2 zero=0 recompute="none"'),
    ("llama-1b", 8, 'pipeline=2 schedule="interleaved-zb" chunks=3 zero=0 recompute="full"'),
    ("qwen3-0.6b", 8, "zero=1"),
    ("qwen3-0.6b", 16, "pipeline=4 zero=1 context=2"),
    ("gpt2-124m", 8, "zero=1"),
    # Drawn by chance from all legal layouts:
    ("gpt2-124m", 64, "zero=1 microbatch=2"),
    ("gpt2-124m", 8, "zero=3 microbatch=32"),
    ("gpt2-124m", 4, 'pipeline=2 tensor=2 schedule="zbv" chunks=2 zero=1 recompute="full" microbatch=16'),
    ("llama-340m", 32, 'context=4 zero=2 recompute="full" microbatch=32'),
    (
        "llama-340m",
        8,
        'pipeline=2 context=2 tensor=2 schedule="interleaved-zb" chunks=3 recompute="selective" microbatch=128',
    ),
    ("llama-340m", 2, 'tensor=2 zero=1 recompute="full" microbatch=1'),
    ("llama-1b", 8, 'pipeline=4 context=2 schedule="zbv" chunks=2 zero=1 recompute="full" microbatch=2'),
    (
        "llama-1b",
        8,
        'pipeline=2 context=2 tensor=2 context_by="ulysses" zero=0 recompute="full" microbatch=64',
    ),
    (
        "qwen3-0.6b",
        64,
        'pipeline=2 context=16 schedule="interleaved" chunks=2 zero=0 recompute="selective" microbatch=4',
    ),
    (
        "qwen3-0.6b",
        8,
        'pipeline=2 context=2 context_by="ulysses" schedule="zbv" chunks=2 zero=1 recompute="full" microbatch=2',
    ),
)
"""Config, GPUs, and what is set in [layout], or of [train] the microbatch."""


def compared(name: str, gpus: int, layout: str) -> dict[str, Any]:
    """One layout on H100s."""
    tables = {"microbatch": "train"}
    given = [f"{tables.get(setting.partition('=')[0], 'layout')}.{setting}" for setting in layout.split()]
    config = load(find_config(name), given)
    cluster = cluster_of("h100", gpus)
    e = estimate(config, job_of(config, gpus), cluster)
    dry = dry_run(config, gpus)
    replayed = replay(dry, e.job, cluster)
    fullest = max(checks(e, dry), key=lambda check: check.executed.peak)
    return {
        "config": name,
        "gpus": gpus,
        "layout": layout,
        "memory": round(100 * fullest.off, 2),
        "time": round(100 * (e.time.total / replayed.total - 1), 2),
        "inside_interval": e.time.low <= replayed.total <= e.time.high,
    }


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for case in CASES:
        row = compared(*case)
        rows.append(row)
        off = f"memory {row['memory']:+6.2f} %  time {row['time']:+6.2f} %"
        print(f"{row['config']:12s}{row['gpus']:4d}  {off}  {row['layout']}", flush=True)
    found = {
        "what": "plan over dry run, less 1, in per cent",
        "date": date.today().isoformat(),
        "median_time": round(statistics.median(abs(row["time"]) for row in rows), 2),
        "most_time": max(abs(row["time"]) for row in rows),
        "most_memory": max(abs(row["memory"]) for row in rows),
        "rows": rows,
    }
    print(f"time: {found['median_time']} % in the median, {found['most_time']} % at most")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
