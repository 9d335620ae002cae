"""Initial weights that no layout can change: a pure function of (seed, logical name, logical index).

Any rank can fill any box of any tensor without the rest, and gets the same bits as a slice of the whole. A
counter-based hash gives 32 random bits a value; only integer operations, table look-ups and one addition
follow, so that every device gives the same bits too. Shapes: R rows (all leading dimensions in one), N
columns (the last one).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from bigtrain.config import ModelConfig
from bigtrain.logical import logical_of
from bigtrain.model.hashing import random_bits, row_keys

CHUNK_CPU = 1 << 16
"""Values at a time on a CPU: 256 KB of int32, so that the passes over them stay in the L2 cache."""
CHUNK_GPU = 1 << 24


class Rule(NamedTuple):
    """How one parameter starts."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float
    """Standard deviation, or bound of the uniform (-scale, scale), or the constant."""


def rule_for(name: str, config: ModelConfig) -> Rule:
    """The rule of a parameter by its logical name.

    Transformer: normal(init_std), divided by sqrt(2 x layers) where a projection writes into the residual
    stream (GPT-2), norms 1, biases 0. LSTM: PyTorch's defaults, uniform within 1 / sqrt(width); its embedding
    normal(init_std).
    """
    module, _, last = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if config.kind == "lstm" and leaf != "embed_tokens":
        return Rule("uniform", 1 / math.sqrt(config.width))
    if last == "bias":
        return Rule("constant", 0.0)
    if leaf.endswith("norm"):
        return Rule("constant", 1.0)
    if leaf in ("o_proj", "down_proj"):
        return Rule("normal", config.init_std / math.sqrt(2 * config.layers))
    return Rule("normal", config.init_std)


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter through its `Logical` record, whatever box of the logical tensor it holds."""
    for parameter in model.parameters():
        record = logical_of(parameter)
        kind, scale = rule_for(record.name, config)
        if kind == "constant":
            parameter.fill_(scale)
        else:
            fill_box(
                parameter, record.name, record.shape, record.offset, seed, scale, uniform=kind == "uniform"
            )


@torch.no_grad()
def fill_box(
    tensor: torch.Tensor,
    name: str,
    shape: Sequence[int],
    offset: Sequence[int],
    seed: int,
    std: float,
    *,
    uniform: bool = False,
) -> None:
    """Write the initial values of one box of a logical tensor into `tensor` (the box's sizes, any dtype).

    normal(0, std), or with `uniform` between -std and std. Values are made in fp32 and rounded once. `shape`
    is the logical tensor's, `offset` where the box starts in it.
    """
    if tensor.numel() == 0:
        return
    if not shape:
        tensor, shape, offset = tensor.view(1), (1,), (0,)
    rows = _row_numbers(shape, offset, tensor.shape, tensor.device)
    N = tensor.shape[-1]
    whole = tensor.is_contiguous()
    out = tensor.view(-1, N) if whole else torch.empty(len(rows), N, dtype=tensor.dtype, device=tensor.device)
    a, b = row_keys(rows, f"{seed}/{name}")
    chunk = CHUNK_CPU if tensor.device.type == "cpu" else CHUNK_GPU
    width = min(N, chunk)
    height = max(1, chunk // width)
    for left in range(0, N, width):
        right = min(left + width, N)
        columns = torch.arange(left, right, device=tensor.device) + offset[-1]
        low = (columns & 0xFFFFFFFF).to(torch.int32)
        for top in range(0, len(rows), height):
            part = slice(top, top + height)
            bits = random_bits(low + a[part, None], b[part, None])
            out[part, left:right] = (_uniform if uniform else _normal)(bits) * std
    if not whole:
        tensor.copy_(out.view(tensor.shape))


def _row_numbers(
    shape: Sequence[int], offset: Sequence[int], sizes: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Numbers of the rows of a box in the logical tensor seen as (R, N); int64."""
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for dim in range(len(shape) - 1):
        here = torch.arange(sizes[dim], device=device) + offset[dim]
        rows = (rows[:, None] * shape[dim] + here).flatten()
    return rows


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """int32 bits to fp32 in [-1, 1]."""
    return bits.to(torch.float32) * 2.0**-31


def _normal(bits: torch.Tensor) -> torch.Tensor:
    """int32 bits to fp32 normal(0, 1): the sum of two normals of variance 1/2, each a 16-bit table look-up.

    2^31 different values, up to 6.1 standard deviations.
    """
    table = _half_normal_table(bits.device)
    high = (bits >> 16).bitwise_and_(0xFFFF)
    low = bits.bitwise_and_(0xFFFF)
    picked = table.index_select(0, low.flatten())
    picked += table.index_select(0, high.flatten())
    return picked.view(bits.shape)


@functools.lru_cache(maxsize=4)
def _half_normal_table(device: torch.device) -> torch.Tensor:
    """65536 equally likely values of normal(0, 1/2): quantiles of bin middles, scaled to that variance."""
    middle = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    quantiles = torch.special.ndtri(middle)
    table: torch.Tensor = quantiles * (0.5 / quantiles.square().mean()).sqrt()
    return table.float().to(device)
