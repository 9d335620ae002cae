"""Check every kernel against float64, then time it against every peer that is installed here.

    python -m benchmarks.kernels                          # on a GPU, under ten minutes: results/kernels.{json,png}
    python -m benchmarks.kernels small --only RMSNorm
    TRITON_INTERPRET=1 python -m benchmarks.kernels --check     # no GPU: only the checks, in Triton's interpreter

Inputs are random and fresh, outputs poisoned. Implementations take turns, on three sets of inputs in turn, so that
nothing is in the cache because it was there before; the time is the median of CUDA events, the spread is from the 10th
to the 90th percentile. What may be reached is measured in the same run: a large matrix product and a copy. Memory is
what a call adds at its peak. Peers beside PyTorch: pip install liger-kernel cut-cross-entropy.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.kernel_cases.case import DEVICE, KernelCase, Run

GROUPS = ("attention", "losses", "small")
OUT = Path(__file__).parent / "results" / "kernels.json"
SETS = 3
"""Sets of inputs that a piece of work is timed on in turn."""


@dataclass(frozen=True)
class Timing:
    """Of one implementation, in milliseconds; `peak` in bytes."""

    middle: float
    low: float
    high: float
    peak: int

    @classmethod
    def of(cls, times: list[float], peak: int) -> Timing:
        """From all times of it."""
        tenths = quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
        return cls(median(times), tenths[0], tenths[-1], peak)


def on_gpu(run: Run) -> float:
    """Milliseconds between two CUDA events around it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def on_cpu(run: Run) -> float:
    """Milliseconds; to try this script."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def measure(
    sets: list[dict[str, Run]], rounds: int, clock: Callable[[Run], float]
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings by implementation, and why others gave none. Each is warmed up on every set, then they take turns."""
    failed: dict[str, str] = {}
    peaks: dict[str, int] = {}
    for name in sets[0]:
        try:
            for runs in sets:
                peaks[name] = peak_of(runs[name])
                runs[name]()
        except Exception as error:  # a peer may fail in any way; the others still count
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    times: dict[str, list[float]] = {name: [] for name in sets[0] if name not in failed}
    for number in range(rounds):
        for name, found in times.items():
            found.append(clock(sets[number % len(sets)][name]))
    return {name: Timing.of(found, peaks[name]) for name, found in times.items()}, failed


def peak_of(run: Run) -> int:
    """Bytes that a run adds at most to what is there before."""
    if DEVICE != "cuda":
        run()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(clock: Callable[[Run], float], size: int = 8192, copied: int = 1 << 30) -> dict[str, float]:
    """TFLOP/s of a bf16 product of `size`, GB/s read and written by a copy of `copied` bytes."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(copied, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    runs: list[dict[str, Run]] = [{"product": lambda: a @ b, "copy": lambda: y.copy_(x)}]
    timings, _ = measure(runs, 30, clock)
    return {
        "TFLOP/s": 2 * size**3 / timings["product"].middle / 1e9,
        "GB/s": 2 * copied / timings["copy"].middle / 1e6,
    }


def row_of(
    case: KernelCase, error: float, timings: dict[str, Timing], failed: dict[str, str], ceiling: float
) -> dict[str, Any]:
    """A case's line of the JSON: rates, and how far each aim is reached."""
    factor = {"TFLOP/s": 1e-9, "GB/s": 1e-6}[case.unit]
    rates = {name: case.work * factor / t.middle for name, t in timings.items()}
    implementations = {
        name: {
            "ms": round(t.middle, 4),
            "ms_10_90": [round(t.low, 4), round(t.high, 4)],
            case.unit: round(rates[name], 1),
            "share_of_ceiling": round(rates[name] / ceiling, 3),
            "peak_mib": round(t.peak / 2**20, 1),
        }
        for name, t in timings.items()
    }
    ours = timings.get("bigtrain")
    aims = []
    for peer, aim in case.aims.items():
        reached = None
        if ours is not None and peer == "ceiling":
            reached = rates["bigtrain"] / ceiling
        elif ours is not None and peer in timings:
            reached = timings[peer].middle / ours.middle
        aims.append(judged(f"times as fast as {peer}", aim, reached, reached is not None and reached >= aim))
    for peer, aim in case.memory_aims.items():
        reached = (
            ours.peak / timings[peer].peak
            if ours is not None and peer in timings and timings[peer].peak
            else None
        )
        aims.append(judged(f"of the memory of {peer}", aim, reached, reached is not None and reached <= aim))
    return {
        "case": case.name, "unit": case.unit, "error_over_allowed": round(error, 3), "right": error <= 1,
        "implementations": implementations, "failed": failed, "aims": aims,
    }  # fmt: skip


def judged(what: str, aim: float, reached: float | None, met: bool) -> dict[str, Any]:
    """`reached` None: nothing to compare with here."""
    return {"what": what, "aim": aim, "reached": None if reached is None else round(reached, 3), "met": met}


def told(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    lines = [
        f"{row['case']}   error {row['error_over_allowed']:.2f} of what is allowed{'' if row['right'] else '   WRONG'}"
    ]
    for name, one in row["implementations"].items():
        low, high = one["ms_10_90"]
        lines.append(
            f"    {name:<18} {one['ms']:9.3f} ms ({low:.3f} to {high:.3f})   {one[row['unit']]:8.1f} {row['unit']}, "
            f"{one['share_of_ceiling']:4.0%} of what was measured   {one['peak_mib']:8.0f} MiB"
        )
    lines += [f"    {name:<18} {why}" for name, why in row["failed"].items()]
    for aim in row["aims"]:
        reached = "not measured here" if aim["reached"] is None else f"{aim['reached']:.2f}"
        lines.append(
            f"    aim {aim['aim']:g} {aim['what']}: {reached}{'' if aim['met'] else '   NOT REACHED'}"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars by case: the share of the measured ceiling that each implementation reaches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["cases"] if row["implementations"]]
    bars = sum(len(row["implementations"]) + 1 for row in rows)
    figure = Figure(figsize=(10, 1 + 0.22 * bars), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places, names, place = [], [], 0.0
    for row in rows:
        axes.text(0, place, row["case"], fontsize=8, fontweight="bold", va="center")
        for name, one in row["implementations"].items():
            place += 1
            ours = name.startswith("bigtrain")
            axes.barh(place, one["share_of_ceiling"], color="#c44e52" if ours else "#8c9bb5")
            words = f" {one[row['unit']]:.0f} {row['unit']}, {one['ms']:.3g} ms"
            axes.text(one["share_of_ceiling"], place, words, fontsize=7, va="center")
            places.append(place)
            names.append(name)
        place += 1.5
    axes.set_yticks(places, names, fontsize=7)
    axes.set_ylim(place - 0.5, -1.0)  # from the top
    axes.set_xlim(
        0, 1.25 * max([1.0, *(o["share_of_ceiling"] for r in rows for o in r["implementations"].values())])
    )
    limits = " and ".join(f"{value:.0f} {unit}" for unit, value in report["ceilings"].items())
    axes.set_xlabel(f"share of what this machine does ({limits}, measured in the same run)")
    axes.set_title(
        f"bigtrain's kernels and their peers on {report['machine']}, {report['date']}", fontsize=10
    )
    figure.savefig(path, dpi=120)


def versions() -> dict[str, str]:
    """Of what was compared."""
    found = {}
    for name in ("torch", "triton", "liger-kernel", "cut-cross-entropy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}


def run_case(
    case: KernelCase, rounds: int, clock: Callable[[Run], float], ceiling: float, seed: int
) -> dict[str, Any]:
    """Check, then time; inputs of one case are gone before the next."""
    error = case.check(seed)
    timings, failed = measure([case.prepare(seed + i) for i in range(SETS)], rounds, clock)
    return row_of(case, error, timings, failed, ceiling)


def cases(groups: list[str], only: str) -> list[KernelCase]:
    found: list[KernelCase] = []
    for group in groups or GROUPS:
        found += importlib.import_module(f"benchmarks.kernel_cases.{group}").CASES
    return [case for case in found if only in case.name]


def check_all(chosen: list[KernelCase], seed: int) -> int:
    """Only the checks; 1 if any fails."""
    if DEVICE != "cuda":
        from tests.kernels.exact_bf16 import install

        install()
    worst = 0.0
    for case in chosen:
        error = case.check(seed)
        worst = max(worst, error)
        print(
            f"{case.name}: error {error:.2f} of what is allowed{'' if error <= 1 else '   WRONG'}", flush=True
        )
    return int(worst > 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all if none is named")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each implementation (30)")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 2**31, help="of the inputs; fresh by default"
    )
    parser.add_argument("--check", action="store_true", help="only compare with float64")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON; the chart goes beside it")
    options = parser.parse_args()
    if unknown := [group for group in options.groups if group not in GROUPS]:
        parser.error(f"no group {unknown[0]!r}: there are {', '.join(GROUPS)}")
    chosen = cases(options.groups, options.only)
    if not chosen:
        parser.error(f"no case has {options.only!r} in its name")
    if options.check:
        return check_all(chosen, options.seed)
    if DEVICE != "cuda":
        parser.error(
            "there is no GPU here: TRITON_INTERPRET=1 python -m benchmarks.kernels --check compares with float64"
        )
    limits = ceilings(on_gpu)
    report: dict[str, Any] = {
        "what": "our kernels and their peers: medians, interleaved, fresh random inputs",
        "machine": torch.cuda.get_device_name(), "date": date.today().isoformat(), "versions": versions(),
        "seed": options.seed, "rounds": options.rounds,
        "ceilings": {unit: round(value, 1) for unit, value in limits.items()}, "cases": [],
    }  # fmt: skip
    for case in chosen:
        report["cases"].append(run_case(case, options.rounds, on_gpu, limits[case.unit], options.seed))
        print(told(report["cases"][-1]), flush=True)
        torch.cuda.empty_cache()
        options.out.write_text(
            json.dumps(report, indent=1) + "\n"
        )  # what is there stays if the time runs out
    draw(report, options.out.with_suffix(".png"))
    return int(not all(row["right"] for row in report["cases"]))


if __name__ == "__main__":
    sys.exit(main())
