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
)
"""Config, GPUs, and what is set in [layout]."""


def compared(name: str, gpus: int, layout: str) -> dict[str, Any]:
    """One layout on H100s."""
    config = load(find_config(name), [f"layout.{setting}" for setting in layout.split()])
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
