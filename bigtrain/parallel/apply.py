"""The one visible order in which a plain model is laid over the mesh: tensor (+ sequence), context, pipeline.

Recomputation is the model's own, inside each layer; data parallelism is the engine's, around everything.
"""

from __future__ import annotations

from torch import nn

from bigtrain.config import Config
from bigtrain.mesh import Mesh
from bigtrain.model.transformer import Transformer
from bigtrain.parallel.context import SharedSequence, share_sequences
from bigtrain.parallel.pipeline import Pipeline, cut, mark_tied
from bigtrain.parallel.region import Later
from bigtrain.parallel.schedule import chunks_of_rank
from bigtrain.parallel.split import layers_of_chunks
from bigtrain.parallel.tensor import share_layers


def lay(model: nn.Module, config: Config, mesh: Mesh) -> nn.Module:
    """What this rank computes of `model`, which is whole and on the meta device; its parameters stay there.

    Called as the model itself, with whole batches; with a pipeline a `Pipeline`.
    """
    layout, piped = config.layout, mesh.pipeline.size > 1
    if max(mesh.tensor.size, mesh.context.size, mesh.pipeline.size) == 1:
        return model
    assert isinstance(model, Transformer), "validated: only transformers are laid over these axes"
    later = Later()
    splits_backward = piped and layout.schedule in ("interleaved-zb", "zbv")
    sequence = layout.sequence and mesh.tensor.size > 1
    if mesh.tensor.size > 1 or splits_backward:
        share_layers(model, mesh, sequence=sequence, later=later)
    if mesh.context.size > 1:
        share_sequences(model, mesh, by=layout.context_by)
    if not piped:
        return SharedSequence(model, mesh, by=layout.context_by, sequence=sequence)
    held_by = chunks_of_rank(layout.schedule, mesh.pipeline.size, layout.chunks)
    held = held_by[mesh.pipeline.rank]
    if layout.pipeline * layout.chunks - 1 not in held_by[0]:  # else rank 0 has both ends of the model
        mark_tied(model, mesh)
    chunks: dict[int, nn.Module] = {
        number: SharedSequence(chunk, mesh, by=layout.context_by, sequence=sequence)
        for number, chunk in cut(model, layers_of_chunks(config), held).items()
    }
    return Pipeline(chunks, mesh, schedule=layout.schedule, virtual=layout.chunks, later=later)
