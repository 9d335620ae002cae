"""Time the attention kernels' candidates for block sizes on this GPU, and print the table of attention_blocks.py.

    python -m benchmarks.tune_attention                  # about 5 minutes; then paste what it prints, and run the gate
    python -m benchmarks.tune_attention --offline        # no GPU: which candidates compile for sm_90 without spilling

Tuning is done here, by a person, and never at the first step of a run: the table is in the repository.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from bigtrain_kernels import attention_backward, attention_forward
from bigtrain_kernels.attention_blocks import TABLE, Blocks
from bigtrain_kernels.attention_cost import pairs

CANDIDATES = [
    Blocks(rows, keys, warps, stages)
    for rows in (16, 32, 64, 128)
    for keys in (32, 64, 128)
    for warps in (4, 8)
    for stages in (1, 2, 3)
]


def inputs(D: int, device: str, B: int = 2, S: int = 8192, H: int = 32, K: int = 8) -> list[torch.Tensor]:
    parts = [torch.randn(B, S, n, D, device=device, dtype=torch.bfloat16) for n in (H, K, K, H)]
    return [*parts, *(torch.randn(B, H, S, device=device) for _ in range(2))]


def call(part: str, blocks: Blocks, parts: list[torch.Tensor]) -> Any:
    """One kernel with these blocks."""
    numbers = attention_backward.Numbers(parts[0].shape[-1] ** -0.5, -1, 0, 0.0)
    if part == "forward":
        return attention_forward.forward(*parts[:3], None, None, None, **numbers._asdict(), blocks=blocks)
    run = attention_backward.queries_gradient if part == "queries" else attention_backward.keys_gradient
    return run(*parts, None, None, numbers, blocks)  # type: ignore[arg-type]


def usable(part: str, D: int) -> Iterator[Blocks]:
    """Candidates that compile for sm_90 without a spill and within shared memory."""
    from tests.kernels.compile_gate import SHARED_BYTES, compiling

    parts = inputs(D, "cpu", B=1, S=256, H=4, K=1)
    name = "attention_forward" if part == "forward" else f"attention_backward_{part}"
    for blocks in CANDIDATES:
        try:
            with compiling() as builds:
                call(part, blocks, parts)
        except Exception as e:  # a compiler may fail in any way: then it is no candidate
            print(f"    {blocks}: {type(e).__name__}", file=sys.stderr)
            continue
        build = next(b for b in builds if b.kernel == name)
        if not build.stack and build.shared <= SHARED_BYTES:
            yield blocks


def milliseconds(run: Any, repeats: int = 10) -> float:
    """The median."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def best(part: str, D: int) -> tuple[Blocks, float]:
    """The fastest, and its TFLOP/s; products that are computed twice in the backward pass count twice."""
    parts = inputs(D, "cuda")
    found = []
    for blocks in CANDIDATES:
        try:
            found.append((milliseconds(lambda b=blocks: call(part, b, parts)), blocks))
        except Exception as e:  # too much shared memory, most often
            print(f"    {blocks}: {type(e).__name__}", file=sys.stderr)
    time, blocks = min(found)
    B, S, H, _ = parts[0].shape
    work = {"forward": 4, "queries": 6, "keys": 8}[part] * B * H * D * pairs(S, S, -1, 0)
    return blocks, work / time / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offline", action="store_true", help="only compile, without a GPU")
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--parts", nargs="+", default=list(TABLE), choices=list(TABLE))
    options = parser.parse_args()
    for part in options.parts:
        print(f"{part.upper()} = {{")
        for D in options.dims:
            if options.offline:
                print(f"    {D}: {[tuple(b) for b in usable(part, D)]}", flush=True)
                continue
            blocks, speed = best(part, D)
            print(f"    {D}: {blocks},  # {speed:.0f} TFLOP/s on {torch.cuda.get_device_name()}", flush=True)
        print("}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
