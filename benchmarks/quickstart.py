"""What the quickstart reaches, from a run that was made by `make quickstart`.

python benchmarks/quickstart.py [RUN]      writes benchmarks/results/quickstart.json
"""

from __future__ import annotations

import json
import statistics
import sys
from datetime import date
from pathlib import Path

from bigtrain.metrics import read_records


def main() -> None:
    """Held-out figures from first to last, time, speed, samples."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    records = list(read_records(run / "metrics.jsonl"))
    steps = [r for r in records if r["kind"] == "step"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    hardware = json.loads((run / "provenance.json").read_text())["attempts"][-1]
    report = {
        "what": "make quickstart: held-out bits per byte from first to last, on this Python's own library",
        "date": date.today().isoformat(),
        "machine": {k: hardware["hardware"][k] for k in ("cpu", "cores", "memory_gib")},
        "versions": hardware["versions"],
        "steps": len(steps),
        "training_tokens": steps[-1]["tokens"],
        "seconds_from_first_to_last_step": round(steps[-1]["time"] - steps[0]["time"], 1),
        "median_tokens_per_second": round(statistics.median(r["tokens_per_second"] for r in steps)),
        "bits_per_byte": {r["step"]: round(r["bits_per_byte"], 4) for r in evaluations},
        "perplexity": {r["step"]: round(r["perplexity"], 2) for r in evaluations},
        "samples_before": (run / "samples" / "before.txt").read_text(encoding="utf-8"),
        "samples_after": (run / "samples" / "after.txt").read_text(encoding="utf-8"),
    }
    out = Path(__file__).parent / "results" / "quickstart.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(out)


main()
