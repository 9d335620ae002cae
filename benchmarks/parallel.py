"""What laying a model over ranks costs: bytes sent, memory held, and speed against torch's own APIs.

    python benchmarks/parallel.py communication|memory|throughput|all        writes benchmarks/results/parallel.json

communication: every collective of one training step, counted and compared with the planner's formulas. memory: peak
bytes of tensors on the fullest rank. throughput: tokens/s over those of a bare torch loop with the same layout, in
turns in one world of two processes. All in fp32 over gloo on CPUs; a CPU figure is a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memory_formula import predicted
from overhead import machine

HERE = Path(__file__).parent
PARTS = ("communication", "memory", "throughput")
SMALL = {"vocab_size": 512, "layers": 4, "width": 192, "heads": 4, "kv_heads": 2, "ffn_width": 384}
"""Matrices are above DeepSpeed's persistence threshold, so that ZeRO-3 cuts them."""
FAST = {"vocab_size": 2048, "layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "ffn_width": 704}
HEAVY = {"vocab_size": 2048, "layers": 4, "width": 384, "heads": 4, "kv_heads": 4, "ffn_width": 1024}
WIDE = {"vocab_size": 512, "layers": 4, "width": 192, "heads": 4, "kv_heads": 4, "ffn_width": 512}

Case = dict[str, Any]


def case(
    world: int, model: dict[str, Any], shape: tuple[int, int, int], name: str = "", **layout: Any
) -> Case:
    """One layout; `shape` is sequences in a microbatch, their length, microbatches of a rank in a step."""
    batch, sequence, microbatches = shape
    told = " ".join(f"{key} {value}" for key, value in layout.items())
    alone = {"tensor", "pipeline", "context"}.isdisjoint(layout)
    layout = {"zero": 0, **layout}
    return {
        "name": name or (f"data {world} {told}".strip() if alone else told),
        "world": world,
        "model": {**model, "max_length": sequence, "tied": layout.pop("tied", False)},
        "batch": batch,
        "sequence": sequence,
        "microbatches": microbatches,
        "layout": layout,
    }


def communication_cases() -> list[Case]:
    """Every kind of traffic on two ranks, and three axes at once on eight."""
    shape = 2, 32, 4
    two: list[dict[str, Any]] = [
        {"tensor": 2, "sequence": False},
        {"tensor": 2},
        {"tensor": 2, "sequence": False, "recompute": "full"},
        {"tensor": 2, "recompute": "full"},
        {"pipeline": 2},
        {"pipeline": 2, "tied": True},
        {"pipeline": 2, "schedule": "interleaved", "chunks": 2},
        {"context": 2},
        {"context": 2, "context_by": "ulysses"},
        *({"zero": level} for level in range(4)),
    ]
    return [
        *(case(2, SMALL, shape, **layout) for layout in two),
        case(8, SMALL, shape, tensor=2, pipeline=2, zero=1, name="tensor 2 pipeline 2 data 2 zero 1"),
    ]


def memory_cases() -> list[Case]:
    """A model whose weights fill the memory, and one whose activations do, along every axis."""
    found = []
    # A data rank's share of the batch is the same with 1 and 2 of them.
    for kind, model, shape in (("weights", HEAVY, (1, 32, 2)), ("activations", WIDE, (2, 512, 4))):
        layouts: list[tuple[int, dict[str, Any]]] = [
            (1, {}),
            *((2, {"zero": level}) for level in range(4)),
            (2, {"tensor": 2, "sequence": False}),
            (2, {"tensor": 2}),
            (4, {"tensor": 4}),
            (2, {"pipeline": 2}),
            (2, {"context": 2}),
            (1, {"recompute": "full"}),
            (2, {"tensor": 2, "recompute": "full"}),
        ]
        for world, layout in layouts:
            found.append(case(world, model, shape, **layout) | {"kind": kind})
    return found


def throughput_cases(rounds: int) -> list[Case]:
    """Every kind of layout on two ranks."""
    layouts: list[dict[str, Any]] = [
        *({"zero": level} for level in range(4)),
        {"tensor": 2, "sequence": False},
        {"tensor": 2},
        {"pipeline": 2, "schedule": "gpipe"},
        {"pipeline": 2},
        *({"pipeline": 2, "schedule": s, "chunks": 2} for s in ("interleaved", "interleaved-zb", "zbv")),
        {"context": 2},
        {"context": 2, "context_by": "ulysses"},
    ]
    return [case(2, FAST, (1, 512, 4), **layout) | {"rounds": rounds, "steps": 1} for layout in layouts]


def main() -> None:
    """Run the parts, merge them into the JSON, print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "parallel.json")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    about = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": {p: version(p) for p in ("torch", "deepspeed", "numpy")}
        | {"python": platform.python_version()},
    }
    for part in PARTS if args.part == "all" else (args.part,):
        if part == "communication":
            section = communication(run(part, communication_cases()))
        elif part == "memory":
            section = memory(run(part, memory_cases()))
        else:
            section = throughput(run(part, throughput_cases(args.rounds))) | {"rounds": args.rounds}
        report[part] = about | section
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def run(part: str, cases: list[Case]) -> list[Case]:
    """Every case in a world of its size, one world a size; each case with what its ranks found."""
    found: dict[int, list[Case]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world in sorted({c["world"] for c in cases}):
            given, out = Path(folder) / f"{world}.json", Path(folder) / f"{world}.out"
            given.write_text(json.dumps([c for c in cases if c["world"] == world]))
            worker = [str(HERE / "parallel_worker.py"), part, str(given), str(out)]
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *torchrun, *worker],
                capture_output=True,
                text=True,
                timeout=1500,
                env=environment,
            )
            if done.returncode:
                sys.exit(f"{part} on {world} ranks failed:\n{done.stdout}\n{done.stderr}")
            found[world] = json.loads(out.read_text())
    return [c | {"ranks": found[c["world"]].pop(0)["ranks"]} for c in cases]


def communication(cases: list[Case]) -> Case:
    """Rank by rank and axis by axis: measured, formula, and what is beyond the planner's with its reason."""
    print("\ncommunication of one step: bytes a rank sends (calls); the rank that sends most")
    for c in cases:
        equal = all(
            row["calls"] == row["formula_calls"]
            and row["formula_bytes"] - row["fewer_at_most"] <= row["bytes"] <= row["formula_bytes"]
            for rank in c["ranks"]
            for row in rank["rows"]
        )
        c["equal_on_all_ranks"] = equal
        most = max(c["ranks"], key=lambda rank: sum(row["bytes"] for row in rank["rows"]))
        print(f"{c['name']}: {'equal to the formula on all ranks' if equal else 'NOT EQUAL'}")
        for row in most["rows"]:
            print(
                f"    {row['axis']:9} {row['op']:15} {row['bytes']:11,.0f} ({row['calls']:3})   formula "
                f"{row['formula_bytes']:11,.0f} ({row['formula_calls']:3})"
                + (f", up to {row['fewer_at_most']:,.0f} fewer" if row["fewer_at_most"] else "")
            )
        for term in most["terms"]:
            if term["beyond"]:
                print(f"      {term['beyond']:+13,.0f} to the planner's on {term['axis']}: {term['why']}")
    return {
        "what": "bytes and calls of one step a rank and axis (ring algorithms), against the planner's formulas",
        "results": cases,
    }


def memory(cases: list[Case]) -> Case:
    """Static and peak bytes of the fullest rank, against one rank and against the formula."""
    print("\nmemory of the fullest rank, MB; ratio to one rank, measured and predicted")
    bases: dict[str, tuple[float, float, float, float]] = {}
    for c in cases:
        fullest = max(c["ranks"], key=lambda rank: rank["peak"])
        static, peak = fullest["static"], fullest["peak"]
        formula = max((predicted(c, rank) for rank in range(c["world"])), key=lambda p: p[1])
        base = bases.setdefault(c["kind"], (static, peak, *formula))
        c["predicted"] = {"static": formula[0], "peak": formula[1]}
        c["ratios"] = {
            "static": round(static / base[0], 3),
            "peak": round(peak / base[1], 3),
            "predicted_static": round(formula[0] / base[2], 3),
            "predicted_peak": round(formula[1] / base[3], 3),
        }
        r = c["ratios"]
        print(
            f"{c['kind']:12} {c['name']:36} static {static / 1e6:6.2f} ({r['static']:.3f}; "
            f"{r['predicted_static']:.3f})  peak {peak / 1e6:6.2f} ({r['peak']:.3f}; {r['predicted_peak']:.3f})  "
            f"measured / predicted {static / formula[0]:.3f}, {peak / formula[1]:.3f}"
        )
    return {
        "what": "bytes of live tensor storage on the fullest rank, after a step and at most",
        "results": cases,
    }


def throughput(cases: list[Case]) -> Case:
    """Ratios of the medians of all rounds."""
    print("\ntokens/s over those of the bare torch equivalent")
    for c in cases:
        first = c.pop("ranks")[0]
        c |= first
        ours, theirs = first["tokens_per_second"]["ours"], first["tokens_per_second"]["theirs"]
        print(
            f"{c['name']:43} {first['ratio']:.3f} (rounds {min(first['ratios']):.3f} to "
            f"{max(first['ratios']):.3f}; {ours:,} and {theirs:,} tokens/s)"
        )
    return {
        "what": "tokens/s of bigtrain over those of torch's own APIs, in turns in one world",
        "results": cases,
    }


if __name__ == "__main__":
    main()
