"""Which kernel computes a forward pass of attention: the portable one, or on Hopper the one in Gluon. Said once each.

The environment variable BIGTRAIN_ATTENTION chooses: auto (the default), portable, hopper. The backward pass is
portable in any case.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch

RUN_ON_HOPPER = False
"""Whether attention_hopper.py has passed tests/gpu/test_attention_paths.py on a Hopper GPU. It has only been compiled
so far, so "auto" does not take it: set this once it has, with the GPU and the date.
"""
_log = logging.getLogger(__name__)


def choose(
    wanted: str, capability: tuple[int, int], dim: int, dtype: torch.dtype, softcap: float, *, proven: bool
) -> tuple[str, str]:
    """("hopper" or "portable", why). ValueError when `wanted` is neither of those nor "auto"."""
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
    if wanted == "auto" and not proven:
        return "portable", "the one for Hopper has not run on a GPU yet; BIGTRAIN_ATTENTION=hopper takes it"
    return "hopper", "the GPU is Hopper"


def on_hopper(q: torch.Tensor, softcap: float) -> bool:
    """Whether the Gluon kernel computes this call."""
    if not q.is_cuda:
        return False
    capability = torch.cuda.get_device_capability(q.device)
    wanted = os.environ.get("BIGTRAIN_ATTENTION", "auto")
    path, why = choose(wanted, capability, q.shape[-1], q.dtype, softcap, proven=RUN_ON_HOPPER)
    _tell(f"attention: the {path} kernels: {why}")
    return path == "hopper"


@cache
def _tell(text: str) -> None:
    _log.info(text)
