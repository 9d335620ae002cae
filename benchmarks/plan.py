"""How far the planner is off: published step times and memory against what it says, on rows it was not fitted to.

python benchmarks/plan.py [DATA] [--rows FILE.csv ...] [--folds 5] [--fit] [--out benchmarks/results/plan.json]

DATA holds published_runs.csv, megatron_ci_memory.csv and vtrain_single_node.csv. Each configuration group is in one
fold; its rows are judged with constants fitted to the other folds, and once more corrected by what the runs of the
other folds say (`bigtrain plan --calibration`), as for a user who has measured some layouts and plans others. --fit
fits to all rows and prints the constants for bigtrain/plan/constants.py. --rows judges further CSVs of the same
columns with the shipped constants, and once more corrected by DATA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.plan_rows import Row, read_rows
from bigtrain.plan.calibration import NEUTRAL, Calibration, Finding, Shape
from bigtrain.plan.constants import CONSTANTS, Constants
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.job import Job
from bigtrain.plan.memory import memory_of
from bigtrain.plan.steptime import StepTime, time_of

FITTED = [f.name for f in dataclasses.fields(Constants) if f.name != "spread"]
START = Constants(
    matmul=0.85,
    hot=0.75,
    fp8=0.8,
    half=2e10,
    narrow=128,
    odd=0.4,
    attention=0.5,
    attention_hot=0.3,
    attention_new=0.55,
    attention_old=0.7,
    unfused=12,
    passes=30,
    loss=30,
    compiled=0.5,
    bandwidth=0.85,
    launch=3e-3,
    link=0.75,
    network=0.75,
    crowding=0.25,
    latency=2e-5,
    hop=4e-6,
    hidden=0.6,
    update=1.3,
    fixed=0.01,
    straggle=0.005,
)
"""Round numbers from which every fit starts and to which it is drawn, never what a fit found."""
MOST = {"matmul": 0.95, "link": 0.9, "network": 0.9, "latency": 5e-5, "straggle": 0.05} | dict.fromkeys(
    (
        "hot",
        "fp8",
        "odd",
        "attention",
        "attention_hot",
        "attention_new",
        "attention_old",
        "compiled",
        "bandwidth",
    ),
    1.0,
)
"""Bounds: shares are at most 1, those of links what NVIDIA's nccl-tests reach, as is the latency inside a node."""
LEAST = {"update": 1.0}
DRAWN = 0.02
"""Weight of a constant's squared logarithm over its start: what the data does not say stays there."""
TAIL = 0.12
"""Logarithm of an error beyond which it counts linearly."""
WEIGHTS = {"vTrain-single": 0.33}
"""Many rows of few kinds: with full weight they would decide alone."""
FILES = ("published_runs.csv", "vtrain_single_node.csv", "megatron_ci_memory.csv")


@dataclass(frozen=True)
class Known:
    """What the planner goes by."""

    constants: Constants
    calibration: Calibration = NEUTRAL

    def time(self, job: Job, cluster: Cluster) -> StepTime:
        """Of a step, corrected."""
        return self.calibration.time(job, cluster, self.constants)


def planned(row: Row, known: Known) -> float:
    """Seconds of a step; of several possible jobs the fastest that fits."""
    fitting = [job for job in row.jobs if len(row.jobs) == 1 or _fits(row, job)] or list(row.jobs)
    return min(known.time(job, row.cluster).total for job in fitting)


def _fits(row: Row, job: Job) -> bool:
    return max(stage.total for stage in memory_of(job)) <= row.cluster.gpu.memory_gib * 2**30


def fit(rows: Sequence[Row]) -> Constants:
    """Least squares of log(measured / planned), long tails cut, by damped Gauss-Newton steps on the logarithms."""
    rows = [r for r in rows if r.seconds and r.specified]
    weights = np.array([WEIGHTS.get(r.source, 1.0) for r in rows])
    first = np.log([getattr(START, name) for name in FITTED])
    low, top = (
        np.log([some.get(name, else_) for name in FITTED]) for some, else_ in ((LEAST, 1e-12), (MOST, 1e15))
    )

    def errors(x: np.ndarray) -> np.ndarray:
        k = _constants(x)
        return np.array([math.log(time_of(r.jobs[0], r.cluster, k).total / r.seconds) for r in rows])  # type: ignore[operator]

    def cost(e: np.ndarray, x: np.ndarray) -> float:
        return float((weights * _huber(e)).sum() + DRAWN * ((x - first) ** 2).sum())

    x, damping = first, 1e-2
    e = errors(x)
    for _ in range(12):
        slopes = np.stack([(errors(_moved(x, i, 0.02)) - e) / 0.02 for i in range(len(x))], 1)
        robust = weights / np.maximum(1.0, np.abs(e) / TAIL)
        normal = slopes.T @ (robust[:, None] * slopes) + DRAWN * np.eye(len(x))
        right = -(slopes.T @ (robust * e)) - DRAWN * (x - first)
        while damping < 1e4:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), right)
            new = np.clip(x + np.clip(step, -0.6, 0.6), low, top)
            new_e = errors(new)
            if cost(new_e, new) < cost(e, x):
                break
            damping *= 5
        else:
            break
        done = cost(e, x) - cost(new_e, new) < 1e-3 * cost(e, x)
        x, e, damping = new, new_e, damping / 5
        if done:
            break
    return _constants(x)


def _moved(x: np.ndarray, i: int, by: float) -> np.ndarray:
    moved = x.copy()
    moved[i] += by  # a share may pass 1 for the slope alone
    return moved


def _huber(e: np.ndarray) -> np.ndarray:
    a = np.abs(e)
    return np.where(a < TAIL, e * e, TAIL * (2 * a - TAIL))


def _constants(x: np.ndarray) -> Constants:
    values = {name: float(f"{math.exp(v):.4g}") for name, v in zip(FITTED, x, strict=True)}
    return dataclasses.replace(CONSTANTS, **values)


def held_out(rows: Sequence[Row], folds: int) -> dict[str, Known]:
    """For every group the constants that were fitted without its fold, and what that fold's other runs say."""
    groups = sorted({r.group for r in rows})
    random.Random(1).shuffle(groups)
    found: dict[str, Known] = {}
    for i in range(folds):
        out = set(groups[i::folds])
        others = [r for r in rows if r.group not in out]
        constants = fit(others)
        found |= dict.fromkeys(out, Known(constants, calibration(others, constants)))
        print(f"fold {i + 1} of {folds} fitted", flush=True)
    return found


def calibration(rows: Sequence[Row], constants: Constants) -> Calibration:
    """What the rows that leave nothing open say."""
    found = []
    for row in rows:
        if row.seconds and row.specified:
            job = row.jobs[0]
            factor = row.seconds / time_of(job, row.cluster, constants).total
            found.append(Finding(row.name, row.cluster.gpu.name, Shape.of(job), factor, 0.0))
    return Calibration(tuple(found))


def table(rows: Sequence[Row], knows: Callable[[Row], Known]) -> dict[str, Any]:
    """Errors of step time by source, of memory, and the regret of choosing layouts."""
    errors: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, list[float]] = defaultdict(list)
    inside, open_inside = [], []
    for row in rows:
        if row.seconds:
            times = [knows(row).time(job, row.cluster) for job in row.jobs]
            low, high = min(t.low for t in times), max(t.high for t in times)
            (inside if row.specified else open_inside).append(low <= row.seconds <= high)
            if row.specified:
                errors[row.source].append(times[0].total / row.seconds - 1)
        if row.memory_gib and row.specified:
            stages = [s.total - s.unseen for s in memory_of(row.jobs[0])]
            held = stages[-1] if row.last_stage else max(stages)
            memory[row.source].append(held / 2**30 / row.memory_gib - 1)
    return {
        "step_time": {name: _summary(e) for name, e in sorted(errors.items())}
        | {"all": _summary(_all(errors))},
        "memory": {name: _summary(e) for name, e in sorted(memory.items())} | {"all": _summary(_all(memory))},
        "layout_regret": _regret(rows, knows),
        "inside_90_interval": {"specified": _share(inside), "not_specified": _share(open_inside)},
    }


def _all(by: dict[str, list[float]]) -> list[float]:
    return [e for es in by.values() for e in es]


def _share(found: Sequence[bool]) -> dict[str, float]:
    return {"rows": len(found), "share": round(sum(found) / max(1, len(found)), 3)}


def _summary(errors: Sequence[float]) -> dict[str, float]:
    """In per cent."""
    if not errors:
        return {"rows": 0}
    size = sorted(abs(e) for e in errors)
    return {
        "rows": len(size),
        "mape": round(100 * statistics.mean(size), 2),
        "median": round(100 * statistics.median(size), 2),
        "p90": round(100 * size[min(len(size) - 1, int(0.9 * len(size)))], 2),
        "bias": round(100 * statistics.mean(errors), 2),
    }


def _regret(rows: Sequence[Row], knows: Callable[[Row], Known]) -> dict[str, float]:
    """Measured time of the layout that the planner calls fastest over the fastest measured, minus 1."""
    sets: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.choice and row.seconds and row.specified:
            sets[row.choice].append(row)
    regrets = []
    for some in sets.values():
        if len({r.jobs for r in some}) > 1:
            chosen = min(some, key=lambda r: planned(r, knows(r)))
            regrets.append(chosen.seconds / min(r.seconds for r in some) - 1)  # type: ignore[operator,type-var]
    best = sum(r < 1e-9 for r in regrets)
    return {
        "sets": len(regrets),
        "best_chosen": best,
        "mean": round(100 * statistics.mean(regrets or [0]), 2),
    }


def show(found: dict[str, Any]) -> None:
    """As text."""
    for kind in ("step_time", "memory"):
        print(f"\n{kind.replace('_', ' '):24s} rows    MAPE  median     p90    bias")
        for name, s in found[kind].items():
            if s["rows"]:
                numbers = "".join(f" {s[key]:6.1f}%" for key in ("mape", "median", "p90"))
                print(f"  {name:22s} {s['rows']:4d}{numbers} {s['bias']:+6.1f}%")
    r, i = found["layout_regret"], found["inside_90_interval"]
    print(f"\nlayout regret {r['mean']} % over {r['sets']} sets, the best chosen in {r['best_chosen']}")
    print(f"inside the 90 % interval: {i['specified']}, rows that leave something open: {i['not_specified']}")


def _all_rows(data: Path) -> list[Row]:
    return [row for name in FILES for row in read_rows(data / name)]


def _unlike(rows: Sequence[Row], data: Path) -> list[Row]:
    """Those in `data` of groups that `rows` has nothing of."""
    groups = {row.group for row in rows}
    return [row for row in _all_rows(data) if row.group not in groups]


def main() -> None:
    """Fit and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data/planner"))
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for path in options.rows:
        print(f"{path} with the shipped constants")
        others = read_rows(path)
        show(table(others, lambda _: Known(CONSTANTS)))
        if options.data.is_dir():
            known = Known(CONSTANTS, calibration(_unlike(others, options.data), CONSTANTS))
            print(f"\ncorrected by the runs of {options.data} that are of other groups")
            show(table(others, lambda _, known=known: known))
    if options.rows:
        return
    rows = _all_rows(options.data)
    if options.fit:
        constants = fit(rows)
        show(table(rows, lambda _: Known(constants)))
        print("\n".join(f"    {name}: float = {getattr(constants, name):g}" for name in FITTED))
        return
    by_group = held_out(rows, options.folds)
    found = table(rows, lambda row: Known(by_group[row.group].constants))
    show(found)
    calibrated = table(rows, lambda row: by_group[row.group])
    print("\ncorrected by the runs of the other folds")
    show(calibrated)
    if options.out:
        about = {
            "what": f"errors in per cent on rows left out of the fit, {options.folds} folds over configuration groups",
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "constants_fitted": len(FITTED),
            "spread": CONSTANTS.spread,
        }
        options.out.write_text(json.dumps(about | found | {"calibrated": calibrated}, indent=1) + "\n")


if __name__ == "__main__":
    main()
