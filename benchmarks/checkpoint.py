"""Saving and loading against torch.distributed.checkpoint (DCP) and torch.save, of the same state, in turns.

    python benchmarks/checkpoint.py [--millions 50] [--rounds 5]        writes benchmarks/results/checkpoint.json

The state: a transformer's fp32 weights and AdamW moments, each tensor cut by rows over the ranks. Saves: ours and
DCP's (with 1 and 2 writer threads), each while the run waits and in the background, and torch.save of a rank's own
part. blocked: until training may go on. total: until it is on the disk (all of them sync). Loads: into 1, 2 and 4
ranks what 2 ranks saved, ours with checksums verified and without, DCP (which has none). Memory: how far the resident
set rises above where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from overhead import machine

HERE = Path(__file__).parent
Case = dict[str, Any]


def main() -> None:
    """Save in a world of 2, load in worlds of 1, 2 and 4, write the JSON, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=50, help="parameters, in millions (12 MB each)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "checkpoint.json")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoints", dir=args.folder))
    try:
        saves = world(2, "save", folder, args)
        loads = {ranks: world(ranks, "load", folder, args) for ranks in (1, 2, 4)}
    finally:
        shutil.rmtree(folder)
    report = {
        "what": "seconds of saving and loading; medians over rounds in turns; the slowest rank counts",
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "parameters": args.millions * 1_000_000,
        "rounds": args.rounds,
        "save": {name: summary(values) for name, values in saves.items()},
        "load": {
            f"{ranks} ranks": {name: summary(v) for name, v in found.items()}
            for ranks, found in loads.items()
        },
    }
    report["ratios"] = ratios(report["save"])
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


def world(ranks: int, what: str, folder: Path, args: argparse.Namespace) -> dict[str, list[Case]]:
    """All rounds of one world: by way of saving or loading, what each round measured."""
    worker = [str(HERE / "checkpoint_worker.py"), what, str(folder), str(args.millions), str(args.rounds)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *torchrun, *worker],
        capture_output=True,
        text=True,
        timeout=3000,
        env=environment,
    )
    if done.returncode:
        sys.exit(f"{what} on {ranks} ranks failed:\n{done.stdout}\n{done.stderr}")
    found: dict[str, list[Case]] = json.loads((folder / f"{what}.json").read_text())
    return found


def summary(rounds: list[Case]) -> Case:
    """Medians of what the rounds measured, and all values of the times."""
    found: Case = {key: round(median(r[key] for r in rounds), 4) for key in rounds[0]}
    return found | {
        f"{key}_rounds": [round(r[key], 3) for r in rounds]
        for key in ("blocked", "total")
        if key in rounds[0]
    }


def ratios(save: dict[str, Case]) -> Case:
    """The three aims: <= 0.5, <= 1.0, <= 1.01."""
    best = min(save[name]["total"] for name in save if name.startswith("DCP, "))
    dcp = min(save[name]["blocked"] for name in save if name.startswith("DCP in the background"))
    return {
        "blocked, ours in the background / DCP's async_save": round(
            save["ours in the background"]["blocked"] / dcp, 3
        ),
        "total, ours with checksums / DCP's best": round(save["ours"]["total"] / best, 3),
        "bytes on disk / bytes of state": round(save["ours"]["bytes"] / save["ours"]["state_bytes"], 5),
    }


def show(report: Case) -> None:
    """The tables."""
    size = report["save"]["ours"]["state_bytes"] / 1e6
    print(
        f"\nsave {size:6,.0f} MB on 2 ranks      blocked s (the first)  total s   bytes/state   extra MB (the first)"
    )
    for name, s in report["save"].items():
        ratio = s["bytes"] / s["state_bytes"]
        print(
            f"{name:34} {s['blocked']:6.3f} ({s['first_blocked']:6.3f}) {s['total']:12.3f} {ratio:13.5f} "
            f"{s['memory'] / 1e6:10,.1f} ({s['first_memory'] / 1e6:,.1f})"
        )
    for ranks, found in report["load"].items():
        print(f"\nload on {ranks:26}    total s   extra memory MB")
        for name, s in found.items():
            print(f"{name:34} {s['total']:9.3f} {s['memory'] / 1e6:17,.1f}")
    print()
    for name, ratio in report["ratios"].items():
        print(f"{name}: {ratio}")


if __name__ == "__main__":
    main()
