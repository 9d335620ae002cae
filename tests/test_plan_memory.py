"""Memory from shapes alone: against the model's own parameters, and the formulas of the papers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigtrain.config import ModelConfig
from bigtrain.engine import zero
from bigtrain.model import loss
from bigtrain.plan import memory
from bigtrain.plan.flops import parameters
from bigtrain.plan.job import Job
from bigtrain.plan.memory import layer_parameters, memory_of

MODEL = ModelConfig(
    vocab_size=32000,
    layers=16,
    width=2048,
    heads=16,
    kv_heads=8,
    ffn_width=5632,
    max_length=4096,
    qk_norm=True,
)
JOB = Job(MODEL, sequence_length=4096, global_batch=64, microbatch=2, zero=0, sequence=False)


def test_the_numbers_copied_from_modules_that_need_torch_are_theirs() -> None:
    assert memory.BUCKET_ELEMENTS == zero.BUCKET_ELEMENTS
    assert (memory.LIVE_ELEMENTS, memory.PREFETCH_ELEMENTS) == (zero.LIVE_ELEMENTS, zero.PREFETCH_ELEMENTS)
    assert (memory.CHUNK_LOGITS, memory.CHUNK_TOKENS) == (loss.CHUNK_GPU, loss.CHUNK_TOKENS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_one_rank_holds_every_parameter_once(tied: bool, bias: bool) -> None:
    model = MODEL.model_copy(update={"tied": tied, "bias": bias, "norm": "layernorm", "position": "learned"})
    (stage,) = memory_of(replace(JOB, model=model))
    assert stage.weights == pytest.approx(2 * parameters(model), rel=1e-6)
    assert stage.optimizer == pytest.approx(12 * parameters(model), rel=1e-6)
    assert stage.gradients == pytest.approx(4 * parameters(model), rel=1e-6)


def test_pipeline_and_tensor_ranks_share_them() -> None:
    whole = parameters(MODEL)
    stages = memory_of(replace(JOB, pipeline=4, tensor=2))
    cut = layer_parameters(MODEL, 2)
    norms = MODEL.layers * cut.whole + MODEL.width
    assert 2 * sum(s.weights for s in stages) / 2 - norms == pytest.approx(whole, rel=1e-6)
    tied = memory_of(replace(JOB, model=MODEL.model_copy(update={"tied": True}), pipeline=4))
    assert sum(s.weights for s in tied) / 2 == pytest.approx(whole, rel=1e-6), (
        "first and last stage have a copy"
    )


@pytest.mark.parametrize("ranks", [2, 8])
def test_zero_shards_what_its_paper_says(ranks: int) -> None:
    held = parameters(MODEL)
    by_level = [memory_of(replace(JOB, data=ranks, zero=level))[0] for level in (0, 1, 2, 3)]
    assert [round(s.state / held, 3) for s in by_level] == [
        18,
        round(6 + 12 / ranks, 3),
        round(2 + 16 / ranks, 3),
        round(18 / ranks, 3),
    ]


def test_kv_heads_are_copied_where_there_are_more_ranks_than_heads() -> None:
    one, many = (layer_parameters(MODEL, t).cut for t in (8, 16))
    kv = 2 * MODEL.width * MODEL.dim_per_head
    assert many == pytest.approx((8 * one - 8 * kv) / 16 + kv)


def test_activations_follow_the_schedule() -> None:
    def first(schedule: str, chunks: int, pipeline: int = 4) -> float:
        job = replace(
            JOB,
            pipeline=pipeline,
            schedule=schedule,
            chunks=chunks,
            split=(16 // pipeline // chunks,) * pipeline * chunks,
        )
        return memory_of(job)[0].activations

    layer = memory.kept_by_layer(JOB).layer
    assert first("1f1b", 1) == pytest.approx(4 * 4 * layer)
    assert first("gpipe", 1) == pytest.approx(32 * 4 * layer)
    assert first("interleaved", 2) == pytest.approx((2 * 3 + 4 + 1) * 2 * layer)
    last = memory_of(replace(JOB, pipeline=4))[-1]
    assert last.activations < first("1f1b", 1) / 2
    assert last.logits > 0


def test_recompute_and_sharing_lower_what_is_kept() -> None:
    kept = [memory.kept_by_layer(replace(JOB, recompute=r)).waiting for r in ("none", "selective", "full")]  # type: ignore[arg-type]
    assert kept[2] == 2 * 2 * 4096 * 2048
    assert kept[2] < kept[1] <= kept[0]
    t8 = replace(JOB, tensor=8)
    assert memory.kept_by_layer(replace(t8, sequence=True)).layer < memory.kept_by_layer(t8).layer
    halved = [memory_of(replace(JOB, context=c))[0].activations for c in (1, 2)]
    assert halved[1] < 0.7 * halved[0]


def test_the_interval_holds_the_point() -> None:
    for stage in memory_of(replace(JOB, pipeline=2, data=4)):
        assert stage.low < stage.total < stage.high
