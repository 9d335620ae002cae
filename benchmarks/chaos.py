"""A hundred faults, drawn at random, in one run of two hosts: it must end with the weights of the undisturbed run.

    sudo python benchmarks/chaos.py [--faults 100] [--seed 1]        writes benchmarks/results/chaos.json

Two hosts (network namespaces, tests/runs/hosts.py) run launch/torchrun.sh, one rank each, as a supervisor would: when
it ends and the run is not done, it is started again. The run directory is on a small file system of its own, which
can be filled. Between faults the run trains a few steps. Every fault ends in a new attempt; seconds are those from the
fault to the record of that attempt's first step, most of it start-up (importing torch twice on this machine's cores).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from overhead import machine
from recovery import prepared

from bigtrain.checkpoint.compare import compare
from tests.runs.conftest import losses_of, steps_of
from tests.runs.hosts import missing, two_hosts
from tests.runs.supervised import World, kill, kill_tree

HERE = Path(__file__).parent
HANG_SECONDS = 20
"""BIGTRAIN_HANG_SECONDS of these runs: silence counts as a hang after a fifth of it, a deadlock after all of it."""
BETWEEN = 12
"""Steps at most between a recovery and the next fault; checkpoints are 5 steps apart."""
SETTINGS = ("layout.zero=0", "train.eval_every=0", "train.max_skipped=1")
"""max_skipped=1: a step that is not finite ends the attempt, so that the run ends with the undisturbed weights."""


# ---- the faults: each does it, and undoes what it did where the run could not go on otherwise


def kill_one(world: World, dice: random.Random) -> None:
    kill(dice.choice(world.ranks()), signal.SIGKILL)


def kill_all(world: World, dice: random.Random) -> None:
    for pid in world.ranks():
        kill(pid, signal.SIGKILL)


def kill_host(world: World, dice: random.Random) -> None:
    kill_tree(world.launchers[dice.randrange(2)].pid)


def stop_one(world: World, dice: random.Random) -> None:
    kill(dice.choice(world.ranks()), signal.SIGSTOP)


def ask_to_stop(world: World, dice: random.Random) -> None:
    kill(dice.choice(world.ranks()), dice.choice((signal.SIGTERM, signal.SIGUSR1)))


def poison(world: World, dice: random.Random) -> None:
    world.poison.touch()


def corrupt(world: World, dice: random.Random) -> None:
    """A flipped byte in the newest checkpoint, found when all ranks come back."""
    files = [path for path in world.newest_checkpoint().iterdir() if path.name != "manifest.json"]
    path = dice.choice(sorted(path for path in files if path.stat().st_size))
    with path.open("r+b") as f:
        f.seek(dice.randrange(path.stat().st_size))
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 0xFF]))
    kill_all(world, dice)


def fill_disk(world: World, dice: random.Random) -> None:
    """No byte is left until the attempt has ended."""
    filler, ranks = world.run.parent / "filler", world.ranks()
    with filler.open("wb", buffering=0) as f:
        while True:
            try:
                f.write(bytes(1 << 12))
            except OSError:
                break
    try:
        gone = [Path(f"/proc/{pid}") for pid in ranks]
        world.until("the end of an attempt without disk", lambda: not any(p.exists() for p in gone), 90)
    finally:
        filler.unlink()


def cut_link(world: World, dice: random.Random) -> None:
    """Until the hosts have noticed: at most as long as a switch that restarts."""
    world.hosts.cut()
    time.sleep(dice.uniform(15, 30))
    world.hosts.mend()


FAULTS: dict[str, Callable[[World, random.Random], None]] = {
    "kill -9 of a rank": kill_one,
    "kill -9 of all ranks": kill_all,
    "kill -9 of a host's launcher and rank": kill_host,
    "SIGSTOP of a rank": stop_one,
    "TERM or USR1 to a rank": ask_to_stop,
    "disk full": fill_disk,
    "NaN in the loss of a rank": poison,
    "corrupted newest checkpoint, kill -9 of all": corrupt,
    "cut link": cut_link,
}


def main() -> None:
    """An undisturbed run, a disturbed one, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "chaos.json")
    parser.add_argument("--keep", type=Path, help="copy the logs of the disturbed run here")
    args = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos") as name, two_hosts() as hosts:
        folder = Path(name)
        config, steps = prepared(folder), 20 * args.faults + 40
        settings = (*SETTINGS, f"train.steps={steps}")
        whole, run = folder / "whole" / "run", folder / "disk" / "run"
        with World(hosts, folder, config, whole, settings, HANG_SECONDS) as world:
            world.until("the end of the undisturbed run", lambda: world.state() == "done", 3600)
        try:
            with small_disk(run.parent), World(hosts, folder, config, run, settings, HANG_SECONDS) as world:
                table = disturbed(world, args.faults, random.Random(args.seed))
                equal = compared(whole, run)
        finally:
            if args.keep:
                for host in (0, 1):
                    shutil.copy(folder / f"host{host}.log", args.keep)
    report = {
        "what": "faults in one run of two hosts, in order; seconds from the fault to a step of the next attempt",
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "seed": args.seed,
        "hang_seconds": HANG_SECONDS,
        "load": round(os.getloadavg()[2], 1),
        "steps": steps,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "against the undisturbed run": equal,
        "by fault": summary(table),
        "faults": table,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "faults"}, indent=1))


def disturbed(world: World, faults: int, dice: random.Random) -> list[dict[str, Any]]:
    """The faults, each after some undisturbed steps; then the rest of the run."""
    table = []
    world.until("two checkpoints", lambda: world.last()[0] >= 12)  # one may be about to be corrupted
    for number in range(faults):
        kind = dice.choice(sorted(FAULTS))
        step, pause = world.last()[0], dice.randint(1, BETWEEN)
        world.until("a few steps", lambda first=step, more=pause: world.last()[0] >= first + more)  # type: ignore[misc]
        assert world.state() == "", "the run ended before the last fault: give it more steps"
        attempts, began, reached = world.attempts(), time.time(), world.last()[0]
        FAULTS[kind](world, dice)
        world.until(
            f"a step after fault {number}: {kind}",
            lambda a=attempts, t=began: world.attempts() > a and world.last()[1] > t + 1,  # type: ignore[misc]
        )
        resumed, when = world.last()
        row = {"fault": kind, "at step": reached, "resumed at": resumed, "seconds": round(when - began, 1)}
        table.append(row)
        print(f"{number + 1:4d}", *row.values(), sep="  ", flush=True)
    world.until("the end of the run", lambda: world.state() == "done", 3600)
    return table


def compared(whole: Path, run: Path) -> dict[str, Any]:
    """The disturbed run beside the undisturbed one. AssertionError unless both are the same to the bit."""
    mine, theirs = steps_of(run), steps_of(whole)
    assert list(mine) == list(theirs), "a step is missing, or twice"
    assert losses_of(run) == losses_of(whole), "a loss differs"
    assert [r["samples"] for r in mine.values()] == [r["samples"] for r in theirs.values()], "samples differ"
    found = compare(*(str(sorted(path.glob("checkpoints/step_*"))[-1]) for path in (whole, run)))
    assert found.equal, "the last checkpoints differ"
    return {"steps": len(mine), "losses": "bitwise", "checkpoint": f"bitwise, {found.compared} tensors"}


def summary(table: list[dict[str, Any]]) -> dict[str, Any]:
    """Count, median and slowest recovery of each kind."""
    times = {kind: [row["seconds"] for row in table if row["fault"] == kind] for kind in FAULTS}
    return {
        kind: {"times": len(found), "median_s": round(median(found), 1), "slowest_s": max(found)}
        for kind, found in times.items()
        if found
    }


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of 256 MiB at `path`."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


if __name__ == "__main__":
    main()
