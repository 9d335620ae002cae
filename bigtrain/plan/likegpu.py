"""Let fake tensors of a CPU take the ways through the code that a GPU's would.

torch cannot run backward passes of fake CUDA tensors without a GPU, so the dry run's tensors say they are on the CPU.
The model asks `x.is_cuda` where it knows something better for one or the other, and torch's fused RMS norm is one
kernel on a GPU and a chain of small ones on a CPU, which keep more for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class LikeGpu(TorchFunctionMode):
    """Inside, tensors say that they are a GPU's, and `F.rms_norm` keeps what a GPU's kernel does."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _IS_CUDA:
            return True
        if func is F.rms_norm:
            return _rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


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
