"""Cross-field checks: every impossible arithmetic is named by its key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from bigtrain.config import Config, ModelConfig, problems

SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"vocab_size": 64, "layers": 2, "width": 32, "heads": 4, "max_length": 64},
    "data": {"path": "data/x", "sequence_length": 16},
    "train": {"steps": 10, "global_batch": 8, "microbatch": 2},
}


def small(**changes: dict[str, Any]) -> Config:
    merged = {**SMALL, **{s: {**SMALL.get(s, {}), **v} for s, v in changes.items()}}
    for section in merged.values():
        if isinstance(section, dict):
            for key in [k for k, v in section.items() if v is None]:
                del section[key]
    return Config.model_validate(merged)


def test_a_plain_config_has_no_problems() -> None:
    assert problems(small()) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"width": 33}}, "model.heads"),
        ({"model": {"heads": None}}, "model.heads"),
        ({"model": {"kv_heads": 3}}, "model.kv_heads"),
        ({"model": {"head_dim": 7}}, "model.head_dim"),
        ({"model": {"dropout": 0.1}}, "model.dropout"),
        ({"model": {"kind": "lstm", "objective": "masked"}}, "model.objective"),
        ({"model": {"kind": "lstm", "tied": True}}, "model.tied"),
        ({"model": {"objective": "masked", "sliding_window": 4}}, "model.sliding_window"),
        (
            {"model": {"position": "learned", "rope_scaling": {"kind": "linear", "factor": 2.0}}},
            "model.rope_scaling",
        ),
        ({"train": {"tokens": 100}}, "train.steps"),
        ({"train": {"steps": None}}, "train.steps"),
        ({"train": {"global_batch_tokens": 128}}, "train.global_batch"),
        ({"train": {"global_batch": None}}, "train.global_batch"),
        ({"train": {"global_batch": None, "global_batch_tokens": 100}}, "train.global_batch_tokens"),
        ({"train": {"batch_ramp_from": 4}}, "train.batch_ramp_from"),
        ({"train": {"batch_ramp_from": 16, "batch_ramp_steps": 5}}, "train.batch_ramp_from"),
        ({"data": {"sequence_length": 65}}, "data.sequence_length"),
        ({"optim": {"warmup_steps": 11}}, "optim.warmup_steps"),
        ({"optim": {"decay_steps": 2}}, "optim.decay_steps"),
        ({"optim": {"kind": "sgd"}}, "optim.lr"),
        ({"layout": {"offload": "optimizer", "engine": "reference"}}, "layout.offload"),
    ],
)
def test_each_impossible_combination_is_named(changes: dict[str, Any], key: str) -> None:
    found = problems(small(**changes))
    assert [p for p in found if p.startswith(f"{key}:")], found


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        small().train.steps = 5  # type: ignore[misc]


def test_derived_shapes() -> None:
    model = ModelConfig(vocab_size=10, layers=1, width=96, heads=6, kv_heads=2)
    assert (model.dim_per_head, model.num_kv_heads, model.ffn) == (16, 2, 256)
    assert ModelConfig(vocab_size=10, layers=1, width=96, heads=6, activation="gelu").ffn == 384
