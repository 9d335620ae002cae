"""How layers are cut: over all ranks of any grid, every element of the model is counted exactly once."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest
import torch

from bigtrain.checkpoint.boxes import Box, coverage_problem
from bigtrain.config import Config
from bigtrain.grid import Grid, grid_of
from bigtrain.logical import logical_of
from bigtrain.mesh import _AXES_OF, Axis, Mesh
from bigtrain.model.build import build_model, materialise
from bigtrain.model.init import initialise
from bigtrain.parallel.apply import lay
from bigtrain.parallel.context import columns_of
from bigtrain.parallel.split import balanced, layers_of_chunks
from bigtrain.parallel.tensor import part_of
from bigtrain.place import Place
from tests.runs.layout_cases import MODELS
from tests.test_grid import config


def mesh_of(grid: Grid, rank: int) -> Mesh:
    """The mesh as `rank` sees it, without process groups."""
    spans = {name: grid.ranks(rank, *axes) for name, axes in _AXES_OF.items()}
    first = spans["tensor"].index(rank) // grid.shared_heads * grid.shared_heads
    spans["heads"] = spans["tensor"][first : first + grid.shared_heads]
    ends = tuple(dict.fromkeys((spans["pipeline"][0], spans["pipeline"][-1])))
    spans["ends"] = ends if rank in ends else (rank,)
    axes = {name: Axis(name, ranks, ranks.index(rank)) for name, ranks in spans.items()}
    return Mesh(Place(rank, grid.world, rank, grid.world, "single"), torch.device("cpu"), None, grid, axes)


def laid(made: Config, grid: Grid, rank: int) -> torch.nn.Module:
    """This rank's part of the model, filled."""
    model = lay(build_model(made.model, made.loss, device="meta"), made, mesh_of(grid, rank))
    materialise(model, "cpu")
    initialise(model, made.model, seed=3)
    return model


LAYOUTS: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {"tensor": 4}, 4),
    ("gpt", {"tensor": 4, "sequence": False}, 4),
    ("mqa", {"tensor": 8, "pipeline": 2}, 16),
    ("llama", {"tensor": 2, "pipeline": 4, "schedule": "interleaved", "chunks": 2}, 8),
    ("window", {"pipeline": 4, "schedule": "zbv", "chunks": 2, "context": 2}, 8),
    ("gpt", {"tensor": 2, "pipeline": 2, "split": [0, 8]}, 4),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "layout", "world"), LAYOUTS)
def test_every_element_is_counted_once_and_starts_as_in_the_whole_model(
    name: str, layout: dict[str, Any], world: int, tied: bool
) -> None:
    made = config(layout, model=MODELS[name] | {"layers": 8, "tied": tied, "max_length": 64})
    grid = grid_of(made, world)
    whole = dict(build_model(made.model, made.loss, seed=3).named_parameters())
    boxes: dict[str, list[Box]] = defaultdict(list)
    held = 0
    for rank in range(world):
        for parameter in laid(made, grid, rank).parameters():
            record = logical_of(parameter)
            assert tuple(parameter.shape) == record.sizes
            part = whole[record.name][
                tuple(slice(o, o + n) for o, n in zip(record.offset, record.sizes, strict=True))
            ]
            assert torch.equal(parameter, part), record.name
            held += parameter.numel()
            if record.counted and mesh_of(grid, rank).replica.rank == 0:
                boxes[record.name].append(Box(record.offset, record.sizes))
    assert boxes.keys() == whole.keys()
    for key, parameter in whole.items():
        assert coverage_problem(tuple(parameter.shape), boxes[key]) == "", key
    if layout.get("tensor", 1) > 1:
        assert held / world < 0.75 * sum(p.numel() for p in whole.values()), "each rank holds a part"


@pytest.mark.parametrize(("total", "size"), [(50257, 4), (128256, 8), (97, 4), (5, 4), (64, 1), (4099, 2)])
def test_parts_are_whole_in_order_and_nearly_equal(total: int, size: int) -> None:
    parts = [part_of(total, rank, size) for rank in range(size)]
    assert [a + n for a, n in parts] == [b for b, _ in parts[1:]] + [total]
    sizes = [n for _, n in parts]
    assert max(sizes) - min(sizes) <= (64 if total >= 1024 * size else 1)


def test_large_parts_start_at_multiples_of_64() -> None:
    assert [part_of(50257, rank, 4)[0] for rank in range(4)] == [0, 12544, 25152, 37696]


@pytest.mark.parametrize("by", ["gather", "ulysses"])
def test_context_ranks_share_every_column_once(by: str) -> None:
    columns = torch.cat([columns_of(rank, 4, 32, by=by) for rank in range(4)])
    assert sorted(columns.tolist()) == list(range(32))


def test_gathered_context_ranks_do_equal_causal_work() -> None:
    work = {int((columns_of(rank, 4, 64, by="gather") + 1).sum()) for rank in range(4)}
    assert len(work) == 1
    assert len({int((columns_of(rank, 4, 64, by="ulysses") + 1).sum()) for rank in range(4)}) == 4


def test_layers_are_balanced_against_the_head() -> None:
    assert balanced(8, 4, head=0.0) == [2, 2, 2, 2]
    assert balanced(32, 4, head=2.4) == [9, 9, 8, 6]
    assert balanced(7, 3, head=0.5) == [3, 2, 2]
    assert balanced(4, 4, head=9.0) == [1, 1, 1, 1]
    assert balanced(5, 1, head=1.0) == [5]
    for layers in range(8, 20):
        for chunks in range(2, 9):
            for head in (0.0, 0.7, 3.0):
                sizes = balanced(layers, chunks, head)
                assert sum(sizes) == layers
                assert min(sizes) >= 1
                slowest = max([*sizes[:-1], sizes[-1] + head])
                others = range(1, layers - chunks + 2)
                best = min(max(n + head, -(-(layers - n) // (chunks - 1))) for n in others)
                assert slowest == best


def test_chunks_hold_consecutive_layers() -> None:
    chunks = layers_of_chunks(config({"pipeline": 2, "split": [5, 3]}))
    assert chunks == [range(5), range(5, 8)]
    assert all(a.stop == b.start for a, b in pairwise(layers_of_chunks(config({"pipeline": 4}))))
