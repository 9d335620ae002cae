"""Which operations of the model run in our Triton kernels, the package bigtrain_kernels; said once in the log.

`kernels` in the config's layout: "auto", on a GPU; "triton", always, for which a CPU needs TRITON_INTERPRET=1;
"torch" and "reference", never.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

_log = logging.getLogger(__name__)


def in_triton(kernels: str, x: torch.Tensor) -> bool:
    """Whether an operation on x other than attention runs in our Triton kernels."""
    return kernels == "triton" or (kernels == "auto" and x.is_cuda)


def attention_in_triton(kernels: str, head_dim: int, dtype: torch.dtype, x: torch.Tensor) -> bool:
    """Whether attention does, where x is: under "auto" it must also be in 16 bits."""
    if not in_triton(kernels, x):
        return False
    if kernels == "triton":
        tell_once(logging.INFO, f"attention: bigtrain's Triton kernels, as asked for, {dtype}")
        return True
    why = attention_refuses(head_dim, dtype)
    if why:
        tell_once(logging.WARNING, f"attention: torch's, not bigtrain's Triton kernels: {why}")
    else:
        tell_once(logging.INFO, f"attention: bigtrain's Triton kernels, {dtype}")
    return not why


def attention_refuses(head_dim: int, dtype: torch.dtype) -> str:
    """Why the attention kernels do not take this on a GPU; "" if they do."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} is not theirs"
    return "" if head_dim <= 256 else f"a head of {head_dim} is larger than 256"


def tell_once(level: int, text: str) -> None:
    """Log it, unless it was, or a graph is being compiled, which logging would break."""
    if not torch.compiler.is_compiling():
        _tell(level, text)


@cache
def _tell(level: int, text: str) -> None:
    _log.log(level, text)
