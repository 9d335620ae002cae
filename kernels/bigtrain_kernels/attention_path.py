"""Which kernels compute attention: the portable ones, or on Hopper those in Gluon. Said once each.

The environment variable BIGTRAIN_ATTENTION chooses: auto (the default), portable, hopper. "auto" takes those for Hopper
once they have passed a test on this machine's GPU (attention_probe.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, partial

import torch

_log = logging.getLogger(__name__)


def choose(
    wanted: str,
    capability: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    softcap: float,
    fault: Callable[[], str],
) -> tuple[str, str]:
    """("hopper" or "portable", why); `fault` says what is wrong with those for Hopper, and is asked last.

    ValueError when `wanted` is neither of those nor "auto".
    """
    if wanted not in ("auto", "portable", "hopper"):
        raise ValueError(f"BIGTRAIN_ATTENTION is {wanted!r}, expected auto, portable or hopper")
    if wanted == "portable":
        return "portable", "asked for by BIGTRAIN_ATTENTION"
    if capability[0] != 9:
        return "portable", f"the GPU is of compute capability {capability[0]}.{capability[1]}, not 9.0"
    if dim not in (64, 128):
        return "portable", f"heads of {dim}, not 64 or 128"
    if softcap:
        return "portable", "there is a softcap"
    if dtype not in (torch.bfloat16, torch.float16):
        return "portable", f"{dtype}"
    if wanted == "hopper":
        return "hopper", "asked for by BIGTRAIN_ATTENTION, on a Hopper GPU"
    wrong = fault()
    if wrong:
        return "portable", f"on this Hopper GPU those for Hopper failed their test, report it: {wrong}"
    return "hopper", "the GPU is Hopper, and they passed their test on it"


def on_hopper(q: torch.Tensor, softcap: float) -> bool:
    """Whether the Gluon kernels compute this call."""
    if not q.is_cuda:
        return False
    capability = torch.cuda.get_device_capability(q.device)
    wanted = os.environ.get("BIGTRAIN_ATTENTION", "auto")
    path, why = choose(wanted, capability, q.shape[-1], q.dtype, softcap, partial(_fault, q.device))
    _tell(logging.WARNING if "failed" in why else logging.INFO, f"attention: the {path} kernels: {why}")
    return path == "hopper"


@cache
def _fault(device: torch.device) -> str:
    from bigtrain_kernels import attention_probe

    return attention_probe.fault(device)


@cache
def _tell(level: int, text: str) -> None:
    _log.log(level, text)
