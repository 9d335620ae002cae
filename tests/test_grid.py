"""The grid of ranks: coordinates, groups, and every refusal before any rank meets another."""

from __future__ import annotations

from typing import Any

import pytest

from bigtrain.config import Config
from bigtrain.configfile import build
from bigtrain.errors import UserError
from bigtrain.grid import AXES, Grid, grid_of, layout_notes


def config(layout: dict[str, Any] | None = None, **changed: Any) -> Config:
    """A small config with a layout."""
    raw: dict[str, Any] = {
        "name": "grid",
        "model": {"vocab_size": 96, "layers": 8, "width": 64, "heads": 8, "kv_heads": 2, "max_length": 64},
        "data": {"path": "none", "sequence_length": 64},
        "train": {"steps": 10, "global_batch": 16},
        "layout": layout or {},
    }
    for key, value in changed.items():
        raw.setdefault(key, {}).update(value)
    return build(raw)


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_furthest_apart() -> None:
    grid = Grid(pipeline=2, data=2, context=2, tensor=2)
    assert grid.world == 16
    assert grid.place(13) == {"pipeline": 1, "data": 1, "context": 0, "expert": 0, "tensor": 1}
    assert grid.ranks(13, "tensor") == (12, 13)
    assert grid.ranks(13, "pipeline") == (5, 13)
    assert grid.ranks(13, "data", "context") == (9, 11, 13, 15)


def test_every_rank_is_in_one_group_of_each_axis() -> None:
    grid = Grid(pipeline=2, data=3, context=2, tensor=4)
    for axis in AXES:
        groups = {grid.ranks(rank, axis) for rank in range(grid.world)}
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world))


def test_data_takes_the_ranks_that_are_left() -> None:
    grid = grid_of(config({"tensor": 4, "pipeline": 2}), 16)
    assert (grid.data, grid.shared_heads) == (2, 2)
    assert str(grid) == "pipeline 2 x data 2 x tensor 4"


def test_one_process_runs_any_layout_and_says_so() -> None:
    made = config({"tensor": 4, "pipeline": 2})
    assert grid_of(made, 1) == Grid()
    assert "8 ranks" in layout_notes(made, 1)[0]
    assert layout_notes(config(), 1) == []


@pytest.mark.parametrize(
    ("layout", "changed", "world", "words"),
    [
        ({"tensor": 4}, {}, 6, ["does not divide 6 ranks", "start 4 or 8 ranks"]),
        ({}, {}, 3, ["train.global_batch", "multiple of 3"]),
        ({"context": 4}, {"data": {"sequence_length": 60}}, 4, ["data.sequence_length", "8 pieces", "64"]),
        (
            {"tensor": 8, "context": 1},
            {"data": {"sequence_length": 63}},
            8,
            ["layout.sequence", "sequence = false"],
        ),
        ({"engine": "reference"}, {}, 2, ["layout.engine", "auto"]),
        ({"zero": 0, "tensor": 2}, {"optim": {"kind": "muon"}}, 2, ["optim.kind", "tensor = 2"]),
        ({"zero": 0, "offload": "optimizer"}, {}, 2, ["layout.offload", "layout.zero = 1"]),
    ],
)
def test_what_does_not_fit_the_number_of_ranks_is_refused(
    layout: dict[str, Any], changed: dict[str, Any], world: int, words: list[str]
) -> None:
    made = config(layout, **changed)
    with pytest.raises(UserError) as caught:
        grid_of(made, world)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tensor": 3}, ["layout.tensor", "nearest that works: 2"]),
        ({"tensor": 4, "context": 4, "context_by": "ulysses"}, ["layout.context", "nearest that works: 2"]),
        ({"pipeline": 16}, ["16 pieces", "pipeline = 8"]),
        ({"pipeline": 2, "schedule": "zbv"}, ["layout.chunks", "chunks = 2"]),
        ({"pipeline": 2, "schedule": "interleaved"}, ["layout.chunks", "chunks = 2"]),
        ({"pipeline": 2, "chunks": 2}, ["layout.chunks", "interleaved"]),
        ({"pipeline": 2, "zero": 3}, ["layout.zero", "zero = 1"]),
        ({"pipeline": 2, "split": [4, 3]}, ["layout.split", "8 layers"]),
        ({"pipeline": 2, "split": [4, 3, 1]}, ["layout.split", "3 numbers"]),
        ({"expert": 2}, ["layout.expert", "no experts"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused(layout: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config(layout)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(UserError, match="3 problems"):
        config({"tensor": 3, "pipeline": 16, "zero": 3})
    with pytest.raises(UserError, match="2 problems with this layout on 6 ranks"):
        grid_of(config({"tensor": 4, "zero": 0, "offload": "optimizer"}), 6)


def test_an_lstm_runs_data_parallel_only() -> None:
    with pytest.raises(UserError, match=r"layout\.tensor.*data-parallel only"):
        build(
            {
                "name": "l",
                "model": {"kind": "lstm", "vocab_size": 96, "layers": 2, "width": 32},
                "data": {"path": "none", "sequence_length": 64},
                "train": {"steps": 1, "global_batch": 2},
                "layout": {"tensor": 2},
            }
        )
