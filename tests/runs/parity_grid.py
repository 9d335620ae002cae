"""`make parity`: every legal layout of the grid against the single process, 20 steps each, as one table.

python -m tests.runs.parity_grid [--minutes M] [--out FILE] [--go-on]. The cases that cover every pair of settings come
first, so that a run that is cut short still says something about all of them; --go-on keeps what the table holds and
runs the rest. Exit code 1 when some layout differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Container
from datetime import date
from pathlib import Path

import torch

from tests.runs.engine_parts import STEPS
from tests.runs.layout_cases import Case, grid, name_of, pairwise, run_of
from tests.runs.parity import BOUNDS, differences, excess, reference, run_cases

AT_ONCE = {2: 25, 4: 25, 8: 4}
"""Cases in one world: start-up takes as long as two or three of them; a table is written after each world."""


def batches(done: Container[str]) -> list[list[Case]]:
    """Cases of equal world size that are not done, AT_ONCE together, the covering ones first."""
    every = grid()
    first = pairwise(every)
    found = []
    for cases in (first, [c for c in every if c not in first]):
        cases = [c for c in cases if name_of(c) not in done]
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
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"))
    parser.add_argument(
        "--go-on", action="store_true", help="keep the rows of --out (of the same code, as far as you know)"
    )
    options = parser.parse_args()
    began = time.monotonic()
    table = json.loads(options.out.read_text())["layouts"] if options.go_on else []
    for row in table:
        row["fails"] = sorted(excess(row))  # the bounds may have changed
    for cases in batches({row["name"] for row in table}):
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            break
        runs = [run_of(c, steps=STEPS) for c in cases]
        with tempfile.TemporaryDirectory() as folder:
            found = run_cases(runs, cases[0]["world"], Path(folder), timeout=400.0 * len(runs))
        for c, run in zip(cases, runs, strict=True):
            errors = differences(found[run["name"]], reference(run))
            wrong = excess(errors)
            rounded = {key: float(f"{value:.2g}") for key, value in errors.items()}
            table.append({"name": name_of(c), "fails": sorted(wrong), **rounded})
            print(
                f"{name_of(c):55s} loss {errors['loss']:.1e} norm {errors['norm']:.1e} {wrong or ''}",
                flush=True,
            )
            _write(options.out, table, len(grid()))
    failed = sum(bool(row["fails"]) for row in table)
    print(
        f"{len(table)} of {len(grid())} layouts, {failed} differ, {(time.monotonic() - began) / 60:.0f} minutes"
    )
    return 1 if failed else 0


def _write(path: Path, table: list[Case], legal: int) -> None:
    worst = {key: max(row[key] for row in table) for key in BOUNDS}
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
                "layouts": table,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
