"""Memory from shapes alone: against the model's own parameters, and the formulas of the papers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from bigtrain_kernels import linear_cross_entropy

from bigtrain.config import Config, ModelConfig
from bigtrain.engine import replica, zero
from bigtrain.engine.reference import DTYPES
from bigtrain.model import loss
from bigtrain.model.kernels import attention_in_triton
from bigtrain.parallel import vocabulary
from bigtrain.parallel.schedule import Timeline, chunks_of_rank, orders
from bigtrain.plan import activations, states
from bigtrain.plan.activations import in_flight, in_layers, kept_of
from bigtrain.plan.dryrun import dry_run
from bigtrain.plan.flops import parameters
from bigtrain.plan.job import Job, job_of
from bigtrain.plan.memory import layer_parameters, memory_of
from bigtrain.plan.oplog import Compute

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
    assert states.BUCKET_ELEMENTS == zero.BUCKET_ELEMENTS
    assert (states.LIVE_ELEMENTS, states.PREFETCH_ELEMENTS) == (zero.LIVE_ELEMENTS, zero.PREFETCH_ELEMENTS)
    assert states.REPLICA_BUCKET_BYTES == replica.BUCKET_BYTES
    assert (activations.CHUNK_LOGITS, activations.CHUNK_TOKENS) == (loss.CHUNK_GPU, loss.CHUNK_TOKENS)
    assert activations.CHUNK_BYTES == linear_cross_entropy.BUDGET
    assert linear_cross_entropy.chunk_tokens(2**40, 1, 2) == activations.CHUNK_TOKENS


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kernels", ["auto", "torch", "triton", "reference"])
@pytest.mark.parametrize("head_dim", [64, 512])
def test_who_attends_is_what_the_model_decides(precision: str, kernels: str, head_dim: int) -> None:
    job = replace(JOB, model=MODEL.model_copy(update={"head_dim": head_dim}), precision=precision)  # type: ignore[arg-type]
    job = replace(job, kernels=kernels in ("auto", "triton"))
    gpu: Any = SimpleNamespace(is_cuda=True)
    if kernels != "triton":  # which is refused before where it cannot be
        assert job.fused_attention == attention_in_triton(kernels, head_dim, DTYPES[precision], gpu)


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
    by_level = [
        memory_of(replace(JOB, data=ranks, zero=level, global_batch=2 * ranks))[0] for level in (0, 1, 2, 3)
    ]
    assert [s.state / held for s in by_level] == pytest.approx(
        [18, 6 + 12 / ranks, 2 + 16 / ranks, 18 / ranks], rel=1e-3
    )


def test_zero_1_keeps_16_bit_gradients_from_one_microbatch_to_the_next() -> None:
    few, many = (memory_of(replace(JOB, data=8, zero=1, global_batch=n))[0] for n in (16, 64))
    assert many.gradients - few.gradients == pytest.approx(2 * parameters(MODEL))
    piped = [memory_of(replace(JOB, data=8, zero=1, pipeline=2, global_batch=n))[1] for n in (16, 64)]
    assert piped[0].gradients == piped[1].gradients, "a pipeline adds them up and drops them"


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

    kept = kept_of(JOB)
    each = 4 * kept.layer + kept.around
    assert first("1f1b", 1) == pytest.approx(4 * each + kept.passing)
    assert first("gpipe", 1) == pytest.approx(32 * each + kept.passing)
    chunk = 2 * kept.layer + kept.around
    assert first("interleaved", 2) == pytest.approx((2 * 3 + 4 + 1) * chunk + kept.passing)
    last = memory_of(replace(JOB, pipeline=4))[-1]
    assert last.activations < first("1f1b", 1) / 2
    assert last.logits > 0


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("interleaved", 3), ("interleaved-zb", 2), ("zbv", 2)],
)
def test_chunks_in_flight_are_those_of_the_schedule(schedule: str, chunks: int, pipeline: int) -> None:
    """Counted in the actions of the schedules themselves; zero-bubble ones between both halves of the backward pass."""
    for microbatches in (*range(1, 18), 32):
        job = replace(
            JOB,
            pipeline=pipeline,
            schedule=schedule,
            chunks=chunks,
            global_batch=2 * microbatches,
            sequence=False,
        )
        actions = Timeline(orders(schedule, pipeline, chunks, microbatches), [], 0.0, [])
        ours = [in_flight(job, stage) for stage in range(pipeline)]
        assert [whole + half for whole, half in ours] == actions.in_flight("BW"), microbatches
        if schedule != "zbv":  # whose halves follow each other
            assert [whole for whole, _ in ours] == actions.in_flight("BI"), microbatches


@pytest.mark.parametrize(("schedule", "chunks"), [("interleaved-zb", 2), ("interleaved-zb", 3), ("zbv", 2)])
@pytest.mark.parametrize("pipeline", [2, 4, 8])
def test_what_zero_bubbles_hold_at_once_is_that_of_the_whole_schedule(
    schedule: str, chunks: int, pipeline: int
) -> None:
    """Counted in a few rounds; halves that wait for their second part can weigh more than wholes, or less."""
    for n in (*range(pipeline, 4 * pipeline + 2), 64):
        job = replace(JOB, pipeline=pipeline, schedule=schedule, chunks=chunks, global_batch=2 * n)
        for stage, actions in enumerate(orders(schedule, pipeline, chunks, n)):
            whole = half = 0
            most = dict.fromkeys((0.1, 1, 8), 0.0)
            for action in actions:
                whole += {"F": 1, "B": -1, "I": -1}.get(action.kind, 0)
                half += {"I": 1, "W": -1}.get(action.kind, 0)
                most = {weight: max(m, whole + weight * half) for weight, m in most.items()}
            flight = in_layers(job, stage, (1,) * chunks)
            for weight, m in most.items():
                assert max(a.whole + weight * a.half for a in flight.between) == m, (n, stage, weight)


@pytest.mark.parametrize("schedule", ["interleaved", "interleaved-zb", "zbv"])
def test_chunks_of_unlike_sizes_are_counted_in_layers(schedule: str) -> None:
    """Beside the schedule's own actions: what is held when a backward pass starts, and while the head runs."""
    p, n, chunks = 4, 16, 2 if schedule == "zbv" else 3
    sizes = (3, 1) if schedule == "zbv" else (3, 2, 1)
    job = replace(JOB, pipeline=p, schedule=schedule, chunks=chunks, global_batch=2 * n)  # type: ignore[arg-type]
    for stage, actions in enumerate(orders(schedule, p, chunks, n)):
        mine = dict(zip(chunks_of_rank(schedule, p, chunks)[stage], sizes, strict=True))
        flight = in_layers(job, stage, sizes)
        held, starts, heads = 0, [], [0]
        for action in actions:
            if action.kind == "F":
                held += mine[action.chunk]
            if action.kind in ("B", "I"):
                starts.append(held)
            if action.chunk == p * chunks - 1 and action.kind != "W":
                heads.append(held)
            if action.kind in ("B", "I"):
                held -= mine[action.chunk]
        assert max(at.whole for at in flight.backward) == max(starts)
        assert flight.head.whole == max(heads)


def test_recompute_and_sharing_lower_what_is_kept() -> None:
    none, selective, full = (kept_of(replace(JOB, recompute=r)) for r in ("none", "selective", "full"))  # type: ignore[arg-type]
    assert full.waiting == 2 * 2 * 4096 * 2048
    assert full.waiting < selective.waiting < none.waiting == none.layer == full.layer
    masked = kept_of(replace(JOB, attention="masked"))
    copies, mask = 2 * 2 * 2 * 4096 * (16 - 8) * 128, 2 * 2 * 4096 * 4096
    assert masked.layer - none.layer == pytest.approx(copies + mask), (
        "kv heads are copied, the mask becomes a bias"
    )
    t8 = replace(JOB, tensor=8)
    assert kept_of(replace(t8, sequence=True)).layer < kept_of(t8).layer
    halved = [memory_of(replace(JOB, context=c))[0].activations for c in (1, 2)]
    assert halved[1] < 0.7 * halved[0]


def test_the_head_of_a_gpipe_keeps_gradients_of_all_microbatches() -> None:
    last = [memory_of(replace(JOB, pipeline=4, schedule=s))[-1].activations for s in ("1f1b", "gpipe")]
    table = 4 * MODEL.vocab_size * MODEL.width
    assert last[1] - last[0] > 31 * table


LAYOUTS: list[tuple[dict[str, Any], str]] = [
    ({"zero": 0}, "bf16"),
    ({"zero": 1}, "bf16"),
    ({"zero": 2, "recompute": "full"}, "bf16"),
    ({"zero": 3}, "bf16"),
    ({"zero": 1}, "fp16"),
    ({"zero": 0}, "fp32"),
    ({"zero": 1, "tensor": 2}, "bf16"),
    ({"zero": 1, "pipeline": 2, "schedule": "1f1b"}, "bf16"),
    ({"zero": 1, "context": 2}, "bf16"),
]


@pytest.mark.parametrize(("layout", "precision"), LAYOUTS, ids=[f"{p} {lay}" for lay, p in LAYOUTS])
def test_the_plan_is_what_the_real_code_holds(
    layout: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of the code itself under fake tensors, with the chunks of logits that a GPU would take."""
    monkeypatch.setattr(loss, "CHUNK_CPU", loss.CHUNK_GPU)
    monkeypatch.setattr(vocabulary, "CHUNK_CPU", loss.CHUNK_GPU)
    config = Config.model_validate(
        {
            "name": "tiny",
            # LayerNorm: an RMS norm is another kernel on a GPU.
            "model": {
                "vocab_size": 4096,
                "layers": 4,
                "width": 512,
                "heads": 8,
                "max_length": 1024,
                "norm": "layernorm",
            }
            | {"activation": "gelu", "position": "learned", "bias": True},
            "data": {"path": "nowhere", "sequence_length": 1024, "document_mask": False},
            "train": {"steps": 10, "global_batch": 16, "microbatch": 2, "precision": precision},
            "layout": layout | {"kernels": "torch"},
        }
    )
    dry = dry_run(config, 4, as_gpu=False)
    planned = memory_of(job_of(config, 4))
    assert len(dry.stages) == len(planned) == layout.get("pipeline", 1)
    for run, stage in zip(dry.stages, planned, strict=True):
        assert stage.total - stage.unseen == pytest.approx(run.peak, rel=0.05), run.by_kind


KERNELS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"zero": 0}, "bf16", {}),
    ({"zero": 1, "recompute": "full"}, "bf16", {"vocab_size": 65536}),
    ({"zero": 1, "tensor": 2}, "bf16", {"vocab_size": 65536}),
    ({"zero": 1, "context": 2, "context_by": "ulysses"}, "fp16", {"qk_norm": True}),
    ({"zero": 0, "context": 2}, "bf16", {}),
    ({"zero": 1, "pipeline": 2}, "bf16", {"tied": True}),
    ({"zero": 0}, "fp32", {"norm": "layernorm"}),
    ({"zero": 0, "kernels": "torch"}, "bf16", {}),
]


@pytest.mark.parametrize(
    ("layout", "precision", "model"), KERNELS, ids=[f"{p} {lay}" for lay, p, _ in KERNELS]
)
def test_the_plan_is_what_the_real_code_holds_with_our_kernels(
    layout: dict[str, Any], precision: str, model: dict[str, Any]
) -> None:
    """Packed documents, as on a GPU: no mask, no repeated key, no logits, but where keys are gathered a mask."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "model": {
                "vocab_size": 4096,
                "layers": 4,
                "width": 512,
                "heads": 8,
                "kv_heads": 2,
                "max_length": 1024,
            }
            | model,
            "data": {"path": "nowhere", "sequence_length": 1024, "document_mask": True},
            "train": {"steps": 10, "global_batch": 16, "microbatch": 2, "precision": precision},
            "layout": layout,
        }
    )
    dry = dry_run(config, 4)
    ours = {item.op for stage in dry.stages for item in stage.table if isinstance(item, Compute)}
    job = job_of(config, 4)
    assert ("bigtrain::attention" in ours) == (job.fused_attention and not job.masked)
    assert ("bigtrain::linear_cross_entropy" in ours) == (layout.get("kernels") != "torch")
    for run, stage in zip(dry.stages, memory_of(job), strict=True):
        assert stage.total - stage.unseen == pytest.approx(run.peak, rel=0.05), run.by_kind


@pytest.mark.parametrize(
    "optim",
    [{"kind": "sgd", "lr": 0.1}, {"kind": "sgd", "lr": 0.1, "momentum": 0.9}, {"kind": "muon"}],
    ids=str,
)
def test_optimizers_hold_what_they_need(optim: dict[str, Any]) -> None:
    config = Config.model_validate(
        {
            "name": "tiny",
            "model": {"vocab_size": 4096, "layers": 4, "width": 512, "heads": 8, "max_length": 1024},
            "data": {"path": "nowhere", "sequence_length": 1024},
            "train": {"steps": 10, "global_batch": 4, "microbatch": 2},
            "optim": optim,
        }
    )
    (run,), (planned,) = dry_run(config, 1).stages, memory_of(job_of(config, 1))
    assert planned.optimizer == pytest.approx(run.by_kind["optimizer"], rel=0.01)
    assert planned.total - planned.unseen == pytest.approx(run.peak, rel=0.05), run.by_kind


def test_the_interval_holds_the_point() -> None:
    for stage in memory_of(replace(JOB, pipeline=2, data=4)):
        assert stage.low < stage.total < stage.high
