"""Root-mean-square (Zhang and Sennrich 2019, arXiv 1910.07467) and layer normalisation (Ba et al. 2016, 1607.06450)."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.model.kernels import in_triton, tell_once


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the statistics are fp32 whatever the dtype of x."""

    def __init__(self, width: int, eps: float, kernels: str = "auto") -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Any shape (..., width) to the same shape and dtype; with a residual, (norm(x + residual), x + residual)."""
        if _takes(self.kernels, x):
            from bigtrain_kernels.norm import rms_norm, rms_norm_residual  # loads triton

            if residual is None:
                return rms_norm(x, self.weight, self.eps)
            return rms_norm_residual(x, residual, self.weight, self.eps)
        if residual is None:
            return self._plain(x)
        x = residual + x
        return self._plain(x), x

    def _plain(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # On a CPU F.rms_norm is a chain of small operations, 1.6x slower than this one (4096 x 256, fp32).
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """(x - mean) / standard deviation * weight + bias over the last dimension, as torch's."""

    def __init__(self, width: int, eps: float, *, bias: bool, kernels: str = "auto") -> None:
        super().__init__(width, eps=eps, bias=bias)
        self.kernels = kernels

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """As RMSNorm's."""
        if _takes(self.kernels, x):
            from bigtrain_kernels.norm import layer_norm, layer_norm_residual  # loads triton

            if residual is None:
                return layer_norm(x, self.weight, self.bias, self.eps)
            return layer_norm_residual(x, residual, self.weight, self.bias, self.eps)
        if residual is None:
            return super().forward(x)
        x = residual + x
        return super().forward(x), x


def _takes(kernels: str, x: torch.Tensor) -> bool:
    if not in_triton(kernels, x):
        return False
    from bigtrain_kernels.norm import WIDEST

    fits = x.shape[-1] <= WIDEST
    if not fits:
        why = f"rows of {x.shape[-1]} are longer than {WIDEST}"
        tell_once(logging.WARNING, f"norms: torch's, not bigtrain's Triton kernels: {why}")
    return fits
