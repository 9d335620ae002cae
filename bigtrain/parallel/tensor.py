"""Tensor and sequence parallelism: lay a plain transformer over the tensor axis, from outside.

`PLAN` says how each layer is cut; the wrappers put `linear`'s and `vocabulary`'s modules in place of the model's.
Every parameter then holds one box of its logical tensor and carries the record of it. Shapes: n tensor ranks, H
heads, K kv heads, D head dim, F ffn width, V vocab.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bigtrain.logical import Logical, logical_of
from bigtrain.mesh import Mesh
from bigtrain.model.attention import Attention
from bigtrain.model.transformer import SHARDING, Block, Transformer
from bigtrain.parallel.linear import ColumnLinears, RowLinear
from bigtrain.parallel.region import Later, Region
from bigtrain.parallel.vocabulary import SharedPositions, VocabularyEmbedding, VocabularyHead

ALIGNED = 64
"""Large cuts start at multiples of this: matrix units want it (cuBLAS: 128 bytes in 16 bits)."""


def share_layers(model: Transformer, mesh: Mesh, *, sequence: bool, later: Later) -> Region:
    """Replace the layers of a whole meta model by this tensor rank's parts.

    Also with one tensor rank, where it only lets weight gradients be put off. Returns the region that the
    layers share.
    """
    region = Region(mesh.tensor, sequence and mesh.tensor.size > 1, later)
    _cut_parameters(model, mesh, region)
    for block in model.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        attention.project = _columns(attention, ("q_proj", "k_proj", "v_proj"), region)
        attention.o_proj = RowLinear(attention.o_proj, region)  # type: ignore[assignment]
        names = ("gate_proj", "up_proj") if hasattr(mlp, "gate_proj") else ("up_proj",)
        mlp.project = _columns(mlp, names, region)
        mlp.down_proj = RowLinear(mlp.down_proj, region)  # type: ignore[assignment]
    if mesh.tensor.size == 1:
        return region
    head: Any = model.lm_head
    model.embed_tokens = VocabularyEmbedding(model.embed_tokens, region)  # type: ignore[arg-type]
    model.lm_head = VocabularyHead(head, model.config.vocab_size, region)
    if region.sequence and model.embed_positions is not None:
        model.embed_positions = SharedPositions(model.embed_positions, region)  # type: ignore[arg-type]
    return region


def _columns(module: nn.Module, names: tuple[str, ...], region: Region) -> ColumnLinears:
    """One module for several projections, which leave their former places."""
    linears = [getattr(module, name) for name in names]
    for name in names:
        delattr(module, name)
    return ColumnLinears(linears, region)


def _cut_parameters(model: Transformer, mesh: Mesh, region: Region) -> None:
    """Give every parameter the shape and the record of this rank's box; tied ones stay one."""
    cut: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, whole in module._parameters.items():
            if whole is None:
                continue
            if whole not in cut:
                record = _box(path, name, logical_of(whole), model, mesh, region)
                cut[whole] = nn.Parameter(torch.empty(record.sizes, device="meta"))
                cut[whole].logical = record  # type: ignore[attr-defined]
            module._parameters[name] = cut[whole]


def _box(path: str, name: str, whole: Logical, model: Transformer, mesh: Mesh, region: Region) -> Logical:
    """This rank's box of a parameter, by the model's sharding plan."""
    axis = mesh.tensor
    kind, side = SHARDING.get(path.rpartition(".")[2], ("", ""))
    if not kind or (side == "in" and name == "bias"):
        # Norms and row biases are the same on all ranks. Their gradients are too, where every rank sees all tokens;
        # with sequence parallelism each saw its share. qk-norms see this rank's heads only.
        in_parts = region.sequence or path.endswith(("q_norm", "k_norm"))
        summed = "tensor" if in_parts and axis.size > 1 else ""
        return replace(whole, counted=axis.rank == 0, summed=summed)
    dim = 1 if side == "in" else 0
    start, size = _range(kind, whole.shape[dim], model, mesh)
    offset, sizes = list(whole.offset), list(whole.sizes)
    offset[dim], sizes[dim] = start, size
    found = replace(whole, offset=tuple(offset), sizes=tuple(sizes))
    if kind == "kv_heads" and mesh.grid.shared_heads > 1:
        return replace(found, counted=mesh.axes["heads"].rank == 0, summed="heads")
    return found


def _range(kind: str, total: int, model: Transformer, mesh: Mesh) -> tuple[int, int]:
    """Start and length of this rank's part of a dim of `total`."""
    rank, size = mesh.tensor.rank, mesh.tensor.size
    if kind == "kv_heads" and size > model.config.num_kv_heads:  # several ranks hold the same head
        rank, size = rank // mesh.grid.shared_heads, model.config.num_kv_heads
    if kind in ("heads", "kv_heads"):
        return rank * total // size, total // size
    return part_of(total, rank, size)


def part_of(total: int, rank: int, size: int) -> tuple[int, int]:
    """Start and length of part `rank` of `size` nearly equal ones; aligned where the parts are large.

    Parts may differ by one (or by ALIGNED), so that no size needs padding: a vocabulary or ffn width that does
    not divide is as good as any other.
    """
    unit = ALIGNED if total >= 16 * ALIGNED * size else 1
    units = -(-total // unit)
    start, end = (min(total, units * r // size * unit) for r in (rank, rank + 1))
    return start, end - start


def attentions(model: nn.Module) -> list[Attention]:
    """The attention modules of a model, in order."""
    return [module for module in model.modules() if isinstance(module, Attention)]
