"""How much of a bare PyTorch loop's speed does `bigtrain train` keep?

Both run the same model on the same shards with the same optimizer, alternating in one session, on 1 and on 2
processes (there against DistributedDataParallel). The ratio is of the medians of all steps; a CPU
figure is a ratio.

    python benchmarks/overhead.py [--rounds 6] [--steps 40]      writes benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bigtrain.configfile import find_config, load, render
from bigtrain.data.prepare import PrepareOptions, prepare
from bigtrain.quickstart import python_text

HERE = Path(__file__).parent
WARM_UP = 12  # steps left out: allocator, caches, TensorBoard's import in its thread (2 s of one core)


def main() -> None:
    """Prepare data, alternate the two programs, write and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overhead.json")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(
            PrepareOptions(
                inputs=tuple(python_text()[:40]), out=folder / "data", tokenizer_kind="bpe", vocab_size=2048
            )
        )
        results = [compare(folder, world, args.rounds, args.steps) for world in (1, 2)]
    report = {
        "what": "bigtrain train over a bare PyTorch loop: tokens/s ratio, time-to-first-step ratio",
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": {p: version(p) for p in ("torch", "deepspeed", "numpy")}
        | {"python": platform.python_version()},
        "rounds": args.rounds,
        "steps": args.steps,
        "results": results,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    for r in results:
        print(
            f"{r['processes']} process(es): {r['throughput_ratio']:.3f} of the bare loop's tokens/s "
            f"(rounds {min(r['throughput_ratios']):.3f} to {max(r['throughput_ratios']):.3f}), "
            f"first step after {r['first_step_ratio']:.2f}x the bare script's time"
        )


def compare(folder: Path, world: int, rounds: int, steps: int) -> dict[str, Any]:
    """Alternate bare and bigtrain; medians of the per-round ratios."""
    config_file = folder / f"config{world}.toml"
    config = load(
        find_config("quickstart"),
        [
            f"data.path={folder / 'data'}",
            f"train.steps={steps}",
            "train.eval_every=0",
            "train.eval_sequences=1",
            "optim.kind=adamw",
            "optim.lr=1e-3",
            "optim.warmup_steps=0",
            "train.global_batch=8",
            "train.microbatch=4",
            "model.width=256",
            "model.heads=4",
            "model.kv_heads=2",
            "model.ffn_width=704",
            "checkpoint.every_steps=0",
            "log.every_steps=1",
        ],
    )
    config_file.write_text(render(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    start = [sys.executable] if world == 1 else torchrun
    bare: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []
    for _ in range(rounds):
        out = run(
            [*start, str(HERE / "bare_loop.py"), str(folder / "data"), config.model_dump_json(), str(steps)]
        )
        bare.append(timings(json.loads(out.strip().splitlines()[-1])))
        run_dir = folder / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        began = time.time()
        run([*start, "-m", "bigtrain", "train", str(config_file), "--run-dir", str(run_dir)])
        records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        ends = [r["time"] for r in records if r["kind"] == "step"]
        ours.append(timings({"first_step": ends[0] - began, "ends": ends}))
    ratios = [median(b["steps"]) / median(o["steps"]) for b, o in zip(bare, ours, strict=True)]
    bare_step, our_step = (median([x for r in side for x in r["steps"]]) for side in (bare, ours))
    firsts = [o["first"] / b["first"] for b, o in zip(bare, ours, strict=True)]
    tokens = (config.train.global_batch or 0) * config.data.sequence_length
    return {
        "processes": world,
        "throughput_ratio": round(bare_step / our_step, 4),
        "throughput_ratios": [round(r, 4) for r in ratios],
        "first_step_ratio": round(median(firsts), 3),
        "first_step_ratios": [round(r, 3) for r in firsts],
        "bare_tokens_per_second": round(tokens / bare_step),
        "bigtrain_tokens_per_second": round(tokens / our_step),
        "bare_first_step_seconds": round(median([b["first"] for b in bare]), 2),
        "bigtrain_first_step_seconds": round(median([o["first"] for o in ours]), 2),
    }


def timings(measured: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the end of each step to the end of the next after warm-up, and seconds to the first step.

    Everything between two steps counts: data, metrics, console.
    """
    ends = measured["ends"][WARM_UP:]
    return {"steps": [b - a for a, b in pairwise(ends)], "first": measured["first_step"]}


def run(command: list[str]) -> str:
    """Run to the end, return standard output; show everything when it fails."""
    environment = {**os.environ, "BENCH_START": str(time.time())}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def machine() -> str:
    """The processor and its cores, without a host name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, no GPU"


if __name__ == "__main__":
    main()
