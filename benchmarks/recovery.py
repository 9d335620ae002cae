"""How long until a dead, stopped or deadlocked rank is noticed, and from the restart to the first step.

    python benchmarks/recovery.py [--rounds 3] [--limit 30]        writes benchmarks/results/recovery.json

Two ranks on this machine train a tiny model (gloo). On one of them a fault comes before step 8; noticed: from the last
step's record to the end of the other rank, which has named it by then. The limit is what BIGTRAIN_HANG_SECONDS allows
without progress (600 by default): a death is seen without it, silence after a fifth of it, a deadlock after all of it.
Restarted: from the start of the same command to the record of the first new step; most of it is importing torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from overhead import machine

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

FAULTS = {"killed (SIGKILL)": "kill", "stopped (SIGSTOP)": "stop", "deadlocked": "lock"}


def main() -> None:
    """Every fault, some rounds in turns; write the JSON, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=30.0, help="BIGTRAIN_HANG_SECONDS of these runs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recovery.json")
    args = parser.parse_args()
    noticed: dict[str, list[float]] = {name: [] for name in FAULTS}
    restarted: list[float] = []
    load = []
    with tempfile.TemporaryDirectory(prefix="recovery") as folder:
        config = prepared(Path(folder))
        for number in range(args.rounds):
            for name, fault in FAULTS.items():
                run = Path(folder) / f"{fault}{number}"
                noticed[name].append(after_a_fault(config, run, fault, args.limit))
                restarted.append(after_a_restart(config, run))
                load.append(os.getloadavg()[0])
            write(args, number + 1, noticed, restarted, load)  # a later round may be the one that hangs
    print(args.out.read_text())


def write(
    args: argparse.Namespace,
    rounds: int,
    noticed: dict[str, list[float]],
    restarted: list[float],
    load: list[float],
) -> None:
    """The JSON, from the rounds so far."""
    report = {
        "what": "seconds; medians over rounds in turns",
        "machine": machine(),
        "load": round(median(load), 1),
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
        "ranks": 2,
        "rounds": rounds,
        "limit": args.limit,
        "noticed": {name: summary(values) for name, values in noticed.items()},
        "restart to first step": summary(restarted),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


def summary(values: list[float]) -> dict[str, Any]:
    """Median and range."""
    return {"median": round(median(values), 2), "from": round(min(values), 2), "to": round(max(values), 2)}


def prepared(folder: Path) -> Path:
    """A tiny corpus and config."""
    import sysconfig

    from bigtrain.data.prepare import PrepareOptions, prepare
    from tests.runs.conftest import TINY

    library = Path(sysconfig.get_path("stdlib"))
    inputs = tuple(str(library / f"{name}.py") for name in ("calendar", "csv", "dis", "heapq", "shlex"))
    prepare(PrepareOptions(inputs=inputs, out=folder / "data", tokenizer_kind="bpe", vocab_size=400))
    config = folder / "tiny.toml"
    config.write_text(TINY.format(data=folder / "data"))
    return config


def world(command: list[str], env: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    """Two ranks; the store is held by this process, as by torchrun's agent."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=120), wait_for_workers=False)
    common = {
        **os.environ,
        **env,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            cwd=ROOT,
            **quiet,  # type: ignore[call-overload]
        )
        for r in range(2)
    ]
    ranks[0].store = store  # alive as long as they are
    return ranks


def train(config: Path, run: Path) -> list[str]:
    """The command, the same before and after a fault."""
    return [
        "train",
        str(config),
        "--run-dir",
        str(run),
        "--set",
        "layout.zero=0",
        "--set",
        "train.eval_every=0",
    ]


def after_a_fault(config: Path, run: Path, fault: str, limit: float) -> float:
    """Seconds from the last step's record to the end of the rank that has no fault."""
    env = {"BIGTRAIN_HANG_SECONDS": str(limit)}
    ranks = world(["-m", "tests.runs.failing", fault, "1", "8", *train(config, run)], env)
    code = ranks[0].wait(timeout=600)
    ended = time.time()
    ranks[1].kill()
    ranks[1].wait()
    assert code == 1, f"rank 0 ended with {code}"
    return ended - (run / "metrics.jsonl").stat().st_mtime


def after_a_restart(config: Path, run: Path) -> float:
    """Seconds from the start of the command to its first new step."""
    metrics = run / "metrics.jsonl"
    began = time.time()
    ranks = world(["-m", "bigtrain", *train(config, run)], {})
    for rank in ranks:
        assert rank.wait(timeout=600) == 0, f"a rank ended with {rank.returncode}"
    records = (json.loads(line) for line in metrics.read_text().splitlines())
    return float(min(r["time"] for r in records if r["kind"] == "step" and r["time"] > began)) - began


if __name__ == "__main__":
    main()
