"""Let fake tensors of a CPU take the ways through the code that a GPU's would.

torch cannot run backward passes of fake CUDA tensors without a GPU, so the dry run's tensors say they are on the CPU.
The model asks `x.is_cuda` where it knows something better for one or the other: there it takes our Triton kernels, of
which fake tensors see what goes in and out (`bigtrain_kernels.workspace` tells the rest). torch's fused RMS norm is one
kernel on a GPU and a chain of small ones on a CPU, which keep more for the backward pass. NCCL says when a message is
gone; gloo, and the group that does nothing, only once it is waited for, so a pipeline keeps all of a step there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F


@contextlib.contextmanager
def like_gpu() -> Iterator[None]:
    """Inside, tensors tell bigtrain's code that they are a GPU's, `F.rms_norm` keeps what a GPU's kernel does, and
    messages are gone at once.

    A TorchFunctionMode would be off within backward passes, which recompute.
    """
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(_asked_by_us), create=True),
        mock.patch.object(F, "rms_norm", _rms_norm),
        mock.patch.object(dist.Work, "is_completed", return_value=True),
    ):
        yield


def _asked_by_us(x: torch.Tensor) -> bool:
    """torch and DeepSpeed go on to ask CUDA for the card."""
    asking: str = sys._getframe(1).f_globals["__name__"]
    return asking.startswith(("bigtrain.", "bigtrain_kernels."))


def _rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float | None = None) -> torch.Tensor:
    apply: Any = _RMSNorm.apply
    found: torch.Tensor = apply(x, weight)
    return found


class _RMSNorm(torch.autograd.Function):
    """Shapes only: aten::_fused_rms_norm keeps its input, the weight, and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rows)
        return torch.mul(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.mul(grads[0], x), weight.clone()
