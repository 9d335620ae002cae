"""Do the kernels in Gluon work on this GPU, with this Triton? Asked once, in a process of its own, and remembered.

They are proven without a GPU (tests/kernels/test_attention_hopper.py), but a compiler, driver or GPU that none of us
has met may make them wrong, or make them wait for ever, which no check inside a training run survives. So before
"auto" takes them the first time, another process compares them with the portable kernels, within a time limit.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bigtrain_kernels import attention_backward, attention_forward

LIMIT_SECONDS = 300
"""Compiling takes 20 s on a slow machine, running less than 1 s."""
SOURCES = ("attention_hopper", "attention_hopper_backward", "attention_hopper_tiles", "attention_tiles")
CASES: tuple[tuple[list[int], int, int], ...] = (
    ([300, 1, 83], -1, 0),
    ([384], 70, 0),
    ([129, 255], -1, -1),
)
"""Lengths of documents, `left`, `right`: each branch of the kernels, ragged ends, more blocks than buffers."""


def differences(
    forward: ModuleType, backward: ModuleType, dim: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, float]]:
    """For each result of each case: its name, and how far it is from the portable kernels', relative to its norm.

    1 also for bits that a second run gives otherwise.
    """
    g = torch.Generator().manual_seed(dim)
    for lengths, left, right in CASES:
        T = sum(lengths)
        q, grad = (torch.randn(1, T, 4, dim, generator=g).to(device, dtype) for _ in range(2))
        k, v = (torch.randn(1, T, 2, dim, generator=g).to(device, dtype) for _ in range(2))
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        window: dict[str, Any] = {"scale": dim**-0.5, "left": left, "right": right}
        numbers = attention_backward.Numbers(**window, softcap=0.0)
        out, lse = attention_forward.forward(q, k, v, cu, cu, None, **window, softcap=0.0)
        terms = attention_backward.terms(grad, torch.zeros_like(lse), out, lse)
        given = (q, k, v, grad, *terms, cu, cu, numbers)
        theirs = [out, lse, *_gradients(attention_backward, given)]
        ours = [
            [*forward.forward(q, k, v, cu, cu, None, **window), *_gradients(backward, given)]
            for _ in range(2)
        ]
        for name, found, again, wanted in zip(("out", "lse", "dq", "dk", "dv"), *ours, theirs, strict=True):
            where = f"{name} of documents {lengths}, window {left}, {right}, heads of {dim}, {dtype}"
            error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
            yield where, error if torch.equal(found, again) else 1.0


def _gradients(kernels: Any, given: tuple[Any, ...]) -> list[torch.Tensor]:
    """dq, dk and dv."""
    return [kernels.queries_gradient(*given), *kernels.keys_gradient(*given)]


def allowed(dtype: torch.dtype) -> float:
    """Both round the same numbers, in another order: half a unit of `dtype` each, and few of them."""
    return 2 * torch.finfo(dtype).eps


def main(device: torch.device) -> str:
    """What is wrong on this device; "" if nothing is."""
    from bigtrain_kernels import attention_hopper, attention_hopper_backward

    for dim in (64, 128):
        for dtype in (torch.bfloat16, torch.float16):
            for name, error in differences(attention_hopper, attention_hopper_backward, dim, dtype, device):
                if not error <= allowed(dtype):
                    return f"{name}: {error:.2g} apart"
    return ""


def fault(device: torch.device) -> str:
    """The same, by a process of its own; remembered in Triton's cache for this GPU, Triton, CUDA and source."""
    import triton

    sources = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in SOURCES)
    about = (
        f"{torch.cuda.get_device_name(device)} {triton.__version__} {torch.version.cuda} {torch.__version__}"
    )
    key = hashlib.sha256(about.encode() + sources).hexdigest()[:16]
    command = [sys.executable, "-m", "bigtrain_kernels.attention_probe", str(device)]
    return remembered(Path(triton.knobs.cache.dir) / f"bigtrain-attention-{key}.txt", command, LIMIT_SECONDS)


def remembered(file: Path, command: list[str], seconds: float) -> str:
    """The last line that `command` prints, "" for "right"; kept in `file`, unless the process did not get so far."""
    try:
        said = file.read_text(encoding="utf-8").strip()
    except OSError:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired:
            return f"they did not end within {seconds:g} s"
        if ran.returncode:
            return f"their test failed: {(ran.stderr.strip().splitlines() or ['no output'])[-1]}"
        said = ran.stdout.strip().splitlines()[-1]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f"{file.name}.{os.getpid()}")
            part.write_text(said, encoding="utf-8")
            part.replace(file)
        except OSError:
            pass  # no cache can be written here: asked again by the next process
    return "" if said == "right" else said


if __name__ == "__main__":
    print(main(torch.device(sys.argv[1])) or "right")
