"""Bytes of one rank of every pipeline stage, by kind, from the shapes alone.

The letters are those of `bigtrain.plan.flops`; T is the tokens of a microbatch that one rank computes, t the tensor
ranks. What a layer keeps for the backward pass is counted from the model's code (fused attention, the loss in chunks);
the method is that of Korthikanti et al. 2022 (arXiv 2205.05198). Bytes a parameter by ZeRO level are those of
Rajbhandari et al. 2020 (arXiv 1910.02054) with fp32 accumulation of gradients, which all of bigtrain's engines do.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from bigtrain.config import ModelConfig
from bigtrain.plan.constants import COMMUNICATOR_BYTES, CONTEXT_BYTES, FRAGMENTATION, MEMORY_SPREAD
from bigtrain.plan.flops import head_flops, layer_flops
from bigtrain.plan.job import Job

BUCKET_ELEMENTS = 100_000_000
LIVE_ELEMENTS, PREFETCH_ELEMENTS = 1_000_000_000, 50_000_000
"""What bigtrain.engine.zero tells DeepSpeed; a test holds them equal (that module needs torch)."""
CHUNK_LOGITS, CHUNK_TOKENS = 1 << 26, 128
"""Logits, and least tokens, of a chunk of the loss: bigtrain.model.loss, held equal by the same test."""
REPLICA_BUCKET_BYTES = 25 << 20


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes of a rank of one stage."""

    weights: float
    gradients: float
    optimizer: float
    """Moments, and the fp32 masters of 16-bit weights."""
    activations: float
    logits: float
    """Of a chunk, and the gradients that the fused loss keeps."""
    buffers: float
    """Buckets on their way, gathered weights, one layer's short-lived tensors."""
    unseen: float
    """What is no tensor: CUDA context, communicators, fragmentation."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.working + self.unseen

    @property
    def state(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def working(self) -> float:
        """What comes and goes with the microbatches."""
        return self.activations + self.logits + self.buffers

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.total - MEMORY_SPREAD * self.working - 0.5 * self.unseen

    @property
    def high(self) -> float:
        """The upper end: what a planner of a real run should reckon with."""
        return self.total + MEMORY_SPREAD * self.working + 0.5 * self.unseen


def memory_of(job: Job, only: Collection[int] | None = None) -> list[StageMemory]:
    """One rank of each pipeline stage, in order; of these stages `only`."""
    if job.model.kind == "lstm":
        return [_lstm(job)]
    stages = layers_of_stages(
        job.model, job.pipeline, job.chunks, job.schedule, job.split, job.sequence_length
    )
    return [_stage(job, i, chunks) for i, chunks in enumerate(stages) if only is None or i in only]


class Shares(NamedTuple):
    """A rank's part of the parameters: cut by tensor ranks, and held by all of them."""

    cut: float
    whole: float


@functools.lru_cache(maxsize=512)
def layer_parameters(model: ModelConfig, tensor: int) -> Shares:
    """Of one block."""
    C, H, K, D, F = model.width, model.num_heads, model.num_kv_heads, model.dim_per_head, model.ffn
    up = 2 if model.activation == "swiglu" else 1
    kv = 2 * K * D / min(tensor, K)  # more ranks than kv heads hold copies
    matrices = C * (2 * H * D / tensor + kv) + (up + 1) * C * F / tensor
    norms = 2.0 * _norm(model)
    if model.bias or model.qkv_bias:
        matrices += H * D / tensor + kv
    if model.bias:
        matrices += up * F / tensor
        norms += 2 * C
    if model.qk_norm:
        norms += 2 * D
    return Shares(matrices, norms)


def _norm(model: ModelConfig) -> int:
    return model.width * (2 if model.norm == "layernorm" and model.bias else 1)


@functools.lru_cache(maxsize=4096)
def layers_of_stages(
    model: ModelConfig,
    pipeline: int,
    chunks: int,
    schedule: str,
    split: tuple[int, ...] | None,
    sequence: int,
) -> tuple[tuple[tuple[int, bool, bool], ...], ...]:
    """For every stage its chunks as (layers, has the embedding, has the head)."""
    from bigtrain.parallel.split import balanced

    count = pipeline * chunks
    if count == 1:
        return (((model.layers, True, True),),)
    head = head_flops(model) / layer_flops(model, sequence)
    sizes = split or tuple(balanced(model.layers, count, head))
    held = [[*range(i, count, pipeline)] for i in range(pipeline)]
    if schedule == "zbv" and pipeline > 1:
        held = [[i, count - 1 - i] for i in range(pipeline)]
    return tuple(tuple((sizes[c], c == 0, c == count - 1) for c in mine) for mine in held)


def _stage(job: Job, stage: int, chunks: tuple[tuple[int, bool, bool], ...]) -> StageMemory:
    m, t = job.model, job.tensor
    layer = layer_parameters(m, t)
    layers = sum(n for n, _, _ in chunks)
    first, last = any(e for _, e, _ in chunks), any(h for _, _, h in chunks)
    ends = m.vocab_size * m.width / t * ((first or (last and m.tied)) + (last and not m.tied))
    if first and m.position == "learned":
        ends += m.max_length * m.width
    held = layers * (layer.cut + layer.whole) + ends + last * _norm(m)
    kept = kept_by_layer(job)
    live = _in_flight(job, stage) * layers / len(chunks)  # layers whose activations wait for a backward pass
    activations = live * kept.waiting + (kept.layer - kept.waiting if job.recompute == "full" else 0.0)
    activations += last * _tokens(job) * m.width * job_bytes(job) * (2 if t > 1 else 1)
    weights, gradients, optimizer, buffers = _state(job, held, layer.cut + layer.whole)
    logits = _logits(job) if last else 0.0
    tensors = weights + gradients + optimizer + activations + logits + buffers + kept.passing
    return StageMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        buffers=buffers + kept.passing,
        unseen=CONTEXT_BYTES + COMMUNICATOR_BYTES * _groups(job) + FRAGMENTATION * tensors,
    )


def job_bytes(job: Job) -> int:
    """Bytes of a number that the model computes with."""
    return 4 if job.precision == "fp32" else 2


def _tokens(job: Job) -> float:
    return job.microbatch * job.sequence_length / job.context


class Kept(NamedTuple):
    """Bytes of one block and one microbatch."""

    layer: float
    """Kept for the backward pass when it runs."""
    waiting: float
    """Of these, while other microbatches are computed: less with recompute."""
    passing: float
    """Short-lived on top, while one block runs."""


def kept_by_layer(job: Job) -> Kept:
    """What one block keeps. Elements: 2 norm inputs and 2 norm outputs (gathered, with tensor ranks), q, k, v and the
    attention's output, and of the feed-forward gate, up, silu(gate) and their product (GELU: 2)."""
    m, t, T, bytes_ = job.model, job.tensor, _tokens(job), job_bytes(job)
    C, H, K, D, F = m.width, m.num_heads, m.num_kv_heads, m.dim_per_head, m.ffn
    outside = T / t if job.sequence and t > 1 else T
    kv = K / min(t, K)
    context = (
        job.context if job.context_by == "gather" else 1
    )  # keys and values of all context ranks are kept
    heads = D * (2 * H / t + 2 * kv * context) * (1.5 if m.qk_norm else 1.0)
    wide = (4 if m.activation == "swiglu" else 2) * F / t
    elements = 2 * outside * C + 2 * T * C + T * heads + T * wide
    layer = bytes_ * elements + 4 * T * H / t
    if job.attention == "unfused" and job.recompute != "selective":
        layer += (
            4 * H / t * T * job.sequence_length
        )  # softmax, and dropout's mask and result where there is any
    if job.recompute == "selective" and job.software != "bigtrain":
        layer *= 0.5  # FSDP users' selective recompute keeps every other product
    waiting = bytes_ * outside * C if job.recompute == "full" else layer
    passing = bytes_ * T * (3 * F / t + 2 * C)
    return Kept(layer, waiting, passing)


def _in_flight(job: Job, stage: int) -> float:
    """Chunks of one microbatch whose activations a rank of this stage holds at the most."""
    p, v, n = job.pipeline, job.chunks, job.microbatches
    if p == 1:
        return 1.0
    if job.schedule == "gpipe":
        return float(n * v)
    if job.schedule == "1f1b":
        return float(min(n, p - stage))
    if job.schedule == "zbv":
        return float(min(2 * n, 2 * p))
    return float(min(n * v, 2 * (p - stage - 1) + (v - 1) * p + 1))  # arXiv 2104.04473, section 2.2


def _state(job: Job, held: float, layer: float) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients, optimizer state and buffers for `held` parameters of a rank."""
    replicas = job.data * job.context
    zero = min(job.zero, 1) if job.pipeline > 1 else job.zero
    share = 1 / replicas if zero >= 1 else 1.0
    mixed = job.precision != "fp32"
    weights = (2.0 if mixed else 4.0) * held
    optimizer = (12.0 if mixed or zero >= 1 else 8.0) * held * share
    gradients = 4.0 * held * (share if zero >= 2 else 1.0)
    if job.offload:
        optimizer = 0.0
    if job.software != "bigtrain":  # Megatron's buckets are its gradients; FSDP holds two layers whole
        whole = 2 * layer * (2 + 4) if zero == 3 else 0.0
        return weights * (share if zero == 3 else 1), gradients, optimizer, whole
    if zero == 0:
        return weights, gradients, optimizer, 2.0 * REPLICA_BUCKET_BYTES if replicas > 1 else 0.0
    buffers = 2 * 4.0 * min(BUCKET_ELEMENTS, held / 8)
    if zero == 3:
        live = min(LIVE_ELEMENTS, max(held / 4, layer)) + min(PREFETCH_ELEMENTS, held / 8)
        weights, buffers = weights * share, buffers + (2.0 if mixed else 4.0) * live
    return weights, gradients, optimizer, buffers


def _logits(job: Job) -> float:
    """A chunk as 16-bit logits, fp32 logits and probabilities, and its 16-bit gradient; the gradients of the hidden
    states and, in fp32, of the matrix, which the fused loss keeps from its forward pass."""
    m, T, bytes_ = job.model, _tokens(job), job_bytes(job)
    rows = m.vocab_size / job.tensor
    if (
        job.software != "bigtrain"
    ):  # all of them at once: fp32, and their 16-bit gradient (measured: 6 to 8 bytes)
        return 7 * T * rows
    chunk = min(T, max(CHUNK_TOKENS, CHUNK_LOGITS // rows)) * rows
    return chunk * (2 * bytes_ + 8) + T * m.width * bytes_ + rows * m.width * 4


def _groups(job: Job) -> int:
    """Communicators of a rank."""
    axes = sum(n > 1 for n in (job.tensor, job.context, job.pipeline, job.data))
    return axes + (job.ranks > 1) + 2 * (job.pipeline > 1)


def _lstm(job: Job) -> StageMemory:
    """The lesson's model: four gates, the cell and the hidden state of every token and layer."""
    from bigtrain.plan.flops import parameters

    m, T = job.model, _tokens(job)
    weights, gradients, optimizer, buffers = _state(
        job, float(parameters(m)), parameters(m) / max(1, m.layers)
    )
    activations = T * m.width * m.layers * 7 * job_bytes(job)
    logits = _logits(job)
    tensors = weights + gradients + optimizer + activations + logits + buffers
    unseen = CONTEXT_BYTES + COMMUNICATOR_BYTES * _groups(job) + FRAGMENTATION * tensors
    return StageMemory(weights, gradients, optimizer, activations, logits, buffers, unseen)
