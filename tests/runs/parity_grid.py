"""`make parity`: every legal layout of the grid against the single process, 20 steps each, as one table.

python -m tests.runs.parity_grid [--minutes M] [--out FILE]. The cases that cover every pair of settings come first, so
that a run that is cut short still says something about all of them. Exit code 1 when some layout differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from tests.runs.engine_parts import STEPS
from tests.runs.layout_cases import Case, grid, name_of, pairwise, run_of
from tests.runs.parity import BOUNDS, differences, excess, reference, run_cases

AT_ONCE = {2: 24, 4: 12, 8: 6}
"""Cases in one world: start-up takes as long as two or three of them."""


def batches() -> list[list[Case]]:
    """Cases of equal world size, AT_ONCE together, the covering ones first."""
    every = grid()
    first = pairwise(every)
    found = []
    for cases in (first, [c for c in every if c not in first]):
        for world, count in AT_ONCE.items():
            same = [c for c in cases if c["world"] == world]
            found += [same[i : i + count] for i in range(0, len(same), count)]
    return found


def main() -> int:
    """Run, print a line a case, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="begin nothing after this time (0: run all)"
    )
    parser.add_argument("--out", default="benchmarks/results/parity.json")
    options = parser.parse_args()
    began, table, failed = time.monotonic(), [], 0
    for cases in batches():
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            break
        runs = [run_of(c, steps=STEPS) for c in cases]
        with tempfile.TemporaryDirectory() as folder:
            found = run_cases(runs, cases[0]["world"], Path(folder), timeout=60.0 * len(runs))
        for c, run in zip(cases, runs, strict=True):
            errors = differences(found[run["name"]], reference(run))
            wrong = excess(errors)
            failed += bool(wrong)
            table.append({"name": name_of(c), **c, "errors": errors, "fails": sorted(wrong)})
            print(
                f"{name_of(c):55s} loss {errors['loss']:.1e} norm {errors['norm']:.1e} {wrong or ''}",
                flush=True,
            )
        _write(Path(options.out), table, len(grid()))
    print(
        f"{len(table)} of {len(grid())} layouts, {failed} differ, {(time.monotonic() - began) / 60:.0f} minutes"
    )
    return 1 if failed else 0


def _write(path: Path, table: list[Case], legal: int) -> None:
    worst = {key: max(row["errors"][key] for row in table) for key in BOUNDS}
    path.write_text(
        json.dumps(
            {
                "what": "largest relative difference from the single-process run over 20 steps, fp32",
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, gloo, 1 thread a process",
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "bounds": BOUNDS,
                "layouts_run": len(table),
                "layouts_in_grid": legal,
                "layouts_that_differ": sum(bool(row["fails"]) for row in table),
                "worst": worst,
                "layouts": [
                    {"name": row["name"], "fails": row["fails"]}
                    | {key: float(f"{value:.2g}") for key, value in row["errors"].items()}
                    for row in table
                ],
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
