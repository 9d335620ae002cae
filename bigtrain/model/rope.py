"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and the ways to stretch them.

Conventions are Hugging Face's, so that its weights load as they are: dimension i of a head turns together
with dimension i + D/2 ("rotate half"), not with its neighbour.
"""

from __future__ import annotations

import math

import torch

from bigtrain.config import ModelConfig, RopeScaling
from bigtrain.model.kernels import in_triton


def inverse_frequencies(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair of dimensions, (D/2,) fp32, and the factor on cos and sin.

    The factor is 1 except for yarn (section 3.4 of the paper: it sharpens attention over long contexts).
    """
    D = config.dim_per_head
    exponent = torch.arange(0, D, 2, dtype=torch.int64, device=device).float() / D
    plain = 1.0 / (config.rope_theta**exponent)
    scaling = config.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return _yarn(plain, scaling, config.rope_theta, D), 0.1 * math.log(scaling.factor) + 1.0


def _llama3(plain: torch.Tensor, s: RopeScaling) -> torch.Tensor:
    """Llama 3.1: short wavelengths stay, long ones are divided by the factor, a linear blend between."""
    turns = s.original_length * plain / (2 * math.pi)
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * plain / s.factor + keep * plain


def _yarn(plain: torch.Tensor, s: RopeScaling, theta: float, D: int) -> torch.Tensor:
    """Peng et al. 2023 (arXiv 2309.00071), equation 23: the blend is linear in the dimension's number."""

    def dimension(turns: float) -> float:
        """The pair that makes this many turns over the original length."""
        return D * math.log(s.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(s.beta_fast)), 0)
    high = min(math.ceil(dimension(s.beta_slow)), D - 1)
    span = max(high - low, 0.001)  # the paper's code: never divide by zero
    pair = torch.arange(D // 2, dtype=torch.float32, device=plain.device)
    stretch = ((pair - low) / span).clamp(0, 1)
    return stretch * plain / s.factor + (1 - stretch) * plain


def rope_tables(positions: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every angle: positions (..., S) -> two fp32 tensors (..., S, 1, D/2).

    The 1 stands for the heads of a (B, S, H, D) tensor. Computed once a forward pass and shared by
    all layers.
    """
    frequencies, factor = inverse_frequencies(config, positions.device)
    angles = positions.float()[..., None, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: str = "auto") -> torch.Tensor:
    """Turn each pair (i, i + D/2) of x (B, S, H, D) by its angle; fp32 inside, rounded once to x's dtype.

    cos and sin are (S, 1, D/2) or (B, S, 1, D/2).
    """
    if in_triton(kernels, x):
        from bigtrain_kernels import rope  # loads triton

        return rope.rotate(x.flatten(0, 1), cos.flatten(0, -2), sin.flatten(0, -2)).view(x.shape)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
