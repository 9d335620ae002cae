"""Bytes of one rank of every pipeline stage, by kind, from the shapes alone.

The letters are those of `bigtrain.plan.flops`; t is the tensor ranks. Bytes a parameter by ZeRO level are those of
Rajbhandari et al. 2020 (arXiv 1910.02054) with fp32 accumulation of gradients, which all of bigtrain's engines do;
activations are `bigtrain.plan.activations`'. A rank is fullest at one of a few moments: while the loss makes its
gradients or scales them, in the backward pass of a layer, or when the gradient of the embedding is there.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from bigtrain.config import ModelConfig
from bigtrain.plan.activations import AtOnce, Kept, bytes_of, in_layers, kept_of, loss_of, tokens_of
from bigtrain.plan.constants import COMMUNICATOR_BYTES, CONTEXT_BYTES, FRAGMENTATION, MEMORY_SPREAD
from bigtrain.plan.elsewhere import elsewhere
from bigtrain.plan.flops import head_flops, layer_flops, parameters
from bigtrain.plan.job import Job
from bigtrain.plan.states import Held, Moment, Peak, state_of

Chunks = tuple[tuple[int, bool, bool], ...]
"""Of a stage: (layers, has the embedding, has the head) each."""


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
    wanted = [(i, chunks) for i, chunks in enumerate(stages) if only is None or i in only]
    if job.software != "bigtrain":
        return [_told(job, elsewhere(job, i, held_by(job, chunks), len(chunks))) for i, chunks in wanted]
    kept = kept_of(job)
    return [_told(job, _stage(job, kept, i, chunks)) for i, chunks in wanted]


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
) -> tuple[Chunks, ...]:
    """For every stage its chunks."""
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


def held_by(job: Job, chunks: Chunks) -> Held:
    """Parameters of a rank with these chunks."""
    m, t = job.model, job.tensor
    layer = layer_parameters(m, t)
    layers = sum(n for n, _, _ in chunks)
    first, last = any(e for _, e, _ in chunks), any(h for _, _, h in chunks)
    table = m.vocab_size * m.width / t
    tables = table * ((first or (last and m.tied)) + (last and not m.tied))
    if first and m.position == "learned":
        tables += m.max_length * m.width
    blocks = layers * (layer.cut + layer.whole)
    return Held(blocks + tables + last * _norm(m), layer.cut + layer.whole, table, layers, first, last)


def _stage(job: Job, kept: Kept, stage: int, chunks: Chunks) -> Peak:
    held = held_by(job, chunks)
    state = state_of(job, held)
    running = kept.layer - kept.waiting if job.recompute == "full" else 0.0
    flight = in_layers(job, stage, tuple(n for n, _, _ in chunks))

    def bytes_at(at: AtOnce) -> float:
        """Of activations."""
        return at.whole * kept.waiting + at.half * kept.halved + at.chunks * kept.around

    messages = _messages(job, held) * kept.message
    before = state.late if job.microbatches > 1 else 0.0  # of the microbatch before
    fullest = max(map(bytes_at, flight.backward))
    moments = [Moment(before, fullest + running + kept.passing, 0.0, state.backward)]
    moments += [Moment(before, bytes_at(at), 0.0, 0.0) for at in flight.between]
    activations = bytes_at(flight.head) + kept.message  # the last hidden states
    if held.last:
        loss = loss_of(job)
        if job.schedule == "gpipe":  # the head's gradients of all other microbatches wait too
            activations += (flight.head.chunks - 1) * loss.kept
        moments += [
            Moment(before, activations, loss.forward, state.head),
            Moment(before + loss.gradient, activations, loss.backward, state.head),
        ]
    if state.late:  # in the last layer of a backward pass
        one = kept.layer + kept.around + kept.passing
        moments.append(Moment(state.late * (1 - 1 / (held.layers + 1)), one, 0.0, 0.0))
    if held.first and job.pipeline > 1:
        table = bytes_of(job) * held.table
        added = 4 * held.table if job.precision == "bf16" and job.zero else 0.0  # its copy in fp32
        after = fullest - held.layers / len(chunks) * kept.waiting - kept.around
        if job.zero_bubble:  # its chunk still waits for the weights' gradients
            after = max(map(bytes_at, flight.between))
        moments.append(Moment(table, after + kept.message, 0.0, added))
    moments.append(Moment(state.late, 0.0, 0.0, state.joined))
    moment = max(moments, key=sum)
    return Peak(state, moment._replace(buffers=moment.buffers + messages))


def _messages(job: Job, held: Held) -> int:
    """Hidden states, or gradients of these, that are under way or awaited at a rank's fullest moment."""
    if job.pipeline == 1:
        return 0
    if job.schedule in ("1f1b", "gpipe"):
        return 1 + (not held.first and not held.last) - (held.last and job.microbatches == 1)
    return 0 if job.schedule == "interleaved" and job.pipeline == 2 else 2


def _told(job: Job, peak: Peak) -> StageMemory:
    state, moment = peak
    seen = state.weights + state.gradients + state.optimizer + state.buffers + sum(moment)
    return StageMemory(
        state.weights,
        state.gradients + moment.gradients,
        state.optimizer,
        moment.activations,
        moment.logits,
        state.buffers + moment.buffers,
        CONTEXT_BYTES + COMMUNICATOR_BYTES * _groups(job) + FRAGMENTATION * seen,
    )


def _groups(job: Job) -> int:
    """Communicators of a rank."""
    axes = sum(n > 1 for n in (job.tensor, job.context, job.pipeline, job.data))
    return axes + (job.ranks > 1) + 2 * (job.pipeline > 1)


LSTM_KEPT = 9
"""Numbers that cuDNN and the dropout keep of a token and feature of an LSTM layer: the input in the order of time, the
output, the mask, and six that cuDNN reserves (four gates, the cell, its tanh). The six are from the equations of the
backward pass: cuDNN tells the size of its reserve on a GPU only."""


def _lstm(job: Job) -> StageMemory:
    """The lesson's model; documents add the copy that joins their outputs."""
    m, T = job.model, tokens_of(job)
    P = float(parameters(m))
    held = Held(P, P / m.layers, float(m.vocab_size * m.width), m.layers, True, True)
    state, loss = state_of(job, held), loss_of(job)
    late = state.late if job.microbatches > 1 else 0.0
    kept = LSTM_KEPT + (job.attention == "masked")
    activations = kept * T * m.width * m.layers * bytes_of(job)
    moments = [
        Moment(late, activations, loss.forward, state.head),
        Moment(late + loss.gradient, activations, loss.backward, state.head),
    ]
    return _told(job, Peak(state, max(moments, key=sum)))
