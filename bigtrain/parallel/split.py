"""Which layers each chunk of a pipeline holds: given by the user, or balanced by cost."""

from __future__ import annotations

from itertools import pairwise

from bigtrain.config import Config
from bigtrain.plan.flops import head_flops, layer_flops


def layers_of_chunks(config: Config) -> list[range]:
    """The layers of every chunk (pipeline x chunks of them, in model order)."""
    layout = config.layout
    count = layout.pipeline * layout.chunks
    sizes = layout.split or balanced(config.model.layers, count, _head(config))
    ends = [sum(sizes[:i]) for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def chunk_costs(config: Config) -> list[float]:
    """Forward cost of every chunk in units of one layer, the head with the last."""
    layers = [float(len(chunk)) for chunk in layers_of_chunks(config)]
    layers[-1] += _head(config)
    return layers


def balanced(layers: int, chunks: int, head: float) -> list[int]:
    """Layers a chunk, at least one each, such that the slowest chunk is as fast as can be.

    `head` is the cost of the output projection and the loss, in layers; it comes on top of the last chunk. Among
    equals the later chunks hold fewer layers: the first ranks wait for the last in every schedule, and the last
    chunk has the logits too.
    """
    if chunks == 1:
        return [layers]
    last = min(
        range(1, layers - chunks + 2),
        key=lambda n: (max(n + head, -(-(layers - n) // (chunks - 1))), -n),
    )
    each, more = divmod(layers - last, chunks - 1)
    return [each + (i < more) for i in range(chunks - 1)] + [last]


def _head(config: Config) -> float:
    """Cost of the head in layers, by forward FLOPs a token."""
    return head_flops(config.model) / layer_flops(config.model, config.data.sequence_length)
