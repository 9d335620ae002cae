"""Which operations of the model run in our Triton kernels, the package bigtrain_kernels; said once in the log.

`kernels` in the config's layout: "auto", on a GPU; "triton", always, for which a CPU needs TRITON_INTERPRET=1;
"reference", never.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from bigtrain.errors import UserError

_log = logging.getLogger(__name__)


def check_kernels(kernels: str, device: torch.device) -> None:
    """Raises UserError when "triton" is asked for where no kernel runs."""
    if kernels == "triton" and device.type != "cuda":
        from bigtrain_kernels.checks import INTERPRETED  # loads triton

        if not INTERPRETED:
            raise UserError(
                f'"triton" needs a GPU, and this process computes on {device.type}',
                where="layout.kernels",
                do='say "auto", which takes the kernels wherever there is a GPU, or set TRITON_INTERPRET=1 to run them '
                "in Triton's interpreter, thousands of times slower",
            )


def in_triton(kernels: str, x: torch.Tensor) -> bool:
    """Whether an operation on x other than attention runs in our Triton kernels."""
    return kernels == "triton" or (kernels == "auto" and x.is_cuda)


def attention_in_triton(kernels: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether attention does: under "auto" it must also be in 16 bits."""
    if kernels == "triton":
        tell_once(
            logging.INFO, f"attention: bigtrain's Triton kernels, as asked for, {dtype} on {device.type}"
        )
        return True
    if kernels != "auto" or device.type != "cuda":
        return False
    why = "" if dtype in (torch.bfloat16, torch.float16) else f"{dtype} is not theirs"
    why = why or ("" if head_dim <= 256 else f"a head of {head_dim} is larger than 256")
    if why:
        tell_once(logging.WARNING, f"attention: torch's, not bigtrain's Triton kernels: {why}")
    else:
        tell_once(logging.INFO, f"attention: bigtrain's Triton kernels, {dtype} on {device.type}")
    return not why


def tell_once(level: int, text: str) -> None:
    """Log it, unless it was, or a graph is being compiled, which logging would break."""
    if not torch.compiler.is_compiling():
        _tell(level, text)


@cache
def _tell(level: int, text: str) -> None:
    _log.log(level, text)
