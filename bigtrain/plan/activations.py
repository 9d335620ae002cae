"""What bigtrain's model and schedules keep for the backward pass, counted from their code; bytes unless said.

T is the tokens of a microbatch that one rank computes, t the tensor ranks. The counts are those of Korthikanti et al.
2022 (arXiv 2205.05198) made for this model: fused attention, projections that share their input, the loss in chunks.
`bigtrain plan CONFIG --dry-run` compares them with the tensors of the executed code.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bigtrain.parallel.schedule import chunks_of_rank, orders
from bigtrain.plan.job import Job

CHUNK_LOGITS, CHUNK_TOKENS = 1 << 26, 128
"""Logits, and least tokens, of a chunk of the loss: bigtrain.model.loss; a test holds them equal."""
CHUNK_BYTES = 1 << 28
"""Bytes of a chunk's logits in our kernels: bigtrain_kernels.linear_cross_entropy; the same test."""


class Kept(NamedTuple):
    """Of one block and one microbatch."""

    layer: float
    """Kept for the backward pass when it runs."""
    waiting: float
    """Of these, while other microbatches are computed: less with recompute."""
    halved: float
    """What a zero-bubble schedule still keeps between the two halves of the backward pass."""
    passing: float
    """Short-lived on top, at the fullest moment of the block's backward pass: that of its feed-forward."""
    around: float
    """Of the microbatch, once for all blocks of a chunk: rotary tables, the mask where it is used again."""
    message: float
    """Hidden states of the microbatch, as one stage sends them to the next."""


def bytes_of(job: Job) -> int:
    """Bytes of a number that the model computes with."""
    return 4 if job.precision == "fp32" else 2


def tokens_of(job: Job) -> float:
    """T."""
    return job.microbatch * job.sequence_length / job.context


def kept_of(job: Job) -> Kept:
    """What one block keeps."""
    m, t, c, T, b = job.model, job.tensor, job.context, tokens_of(job), bytes_of(job)
    C, D, F, H = m.width, m.dim_per_head, m.ffn / t, m.num_heads / t
    K = m.num_kv_heads / min(t, m.num_kv_heads)
    shared = T / t if job.sequence else T
    residual = 2 * shared * C
    entered = 2 * T * C  # the outputs of both norms, gathered from the tensor ranks
    up, passed = (2, 2) if m.activation == "swiglu" else (1, 1)
    # Of SwiGLU torch keeps four tensors, our kernel three: silu(gate) is computed again.
    wide = (3 if job.kernels and up == 2 else 2 * up) * T * F
    core, plain, mask = _attention(job, H, K)
    heads = T * (H + K) * D if m.qk_norm else 0.0
    sums = T * H * 4 + shared * 8  # of softmax and of both norms, fp32
    if job.kernels and m.qk_norm:
        sums += T * (H + K) * 4
    layer = b * (residual + entered + wide + core + heads) + sums + b * mask
    waiting = layer
    if job.recompute == "full":
        waiting = b * shared * C
    elif job.recompute == "selective":
        waiting = layer - b * (core + mask - plain) - T * H * 4
    # What the products took in, and the gradients of what they gave.
    halved = b * (2 * entered + T * (2 * H + 2 * K) * D + (up + 1) * T * F)
    again = mask if job.recompute != "none" else 0.0  # one byte for each of the mask's elements
    # The last product's backward pass gathers its output's gradient and makes one of the inner width; when those of
    # what that came from are made, its own operands are gone, unless they wait for the weight's gradient.
    gathered = T * C if t > 1 and job.sequence else 0.0
    products = (passed + 1) * T * F + gathered if job.zero_bubble else passed * T * F
    # In attention's, which comes later, keys and values of all ranks have their gradients: of every head, or of their
    # own heads twice. Of feed-forward nothing is there any more, but what waits.
    attending = T * H * D + gathered
    if c > 1 and job.context_by == "gather":
        attending += repeated(job) or 4 * job.microbatch * job.sequence_length * K * D
    if job.recompute == "selective":
        attending += (layer - waiting) / b
    attending += gathered if job.zero_bubble else -(wide + entered / 2 + shared * C)
    passing = max(products, T * F + gathered, attending) + shared * C
    return Kept(
        layer=layer,
        waiting=waiting,
        halved=halved,
        passing=b * passing,
        around=again + (4 * T * D if m.position == "rope" else 0.0),
        message=b * shared * C,
    )


def _attention(job: Job, H: float, K: float) -> tuple[float, float, float]:
    """Elements that fused attention keeps, those that it starts from, and those of the mask."""
    m, T, c = job.model, tokens_of(job), job.context
    D, S, B = m.dim_per_head, job.sequence_length, job.microbatch
    plain = T * (2 * H + 2 * K) * D  # queries, keys, values and the output
    gather = c > 1 and job.context_by == "gather"
    causal, masked = m.objective == "causal", job.masked
    copied = _copied(job)
    squares = B * S * S if masked else 0.0
    if gather:  # all outputs are joined in a copy
        values = repeated(job) or 2 * B * S * K * D
        return 3 * T * H * D + values, plain, squares * ((2 * c + 1) / (4 * c * c) if causal else 1 / c)
    if c > 1:  # Ulysses: all three exchanged in one tensor, the output exchanged back
        packed = T * (H + 2 * max(K, c)) * D
        return packed + 2 * T * H * D + (2 * T * H * D if copied and c < K else 0.0), plain, squares
    return 2 * T * H * D + 2 * T * (H if copied else K) * D, plain, squares


def _copied(job: Job) -> bool:
    """Whether attention gets the keys and values of grouped heads once for every head."""
    m = job.model
    gather = job.context > 1 and job.context_by == "gather"
    alone = gather and m.objective == "causal" and not job.fused_attention
    return (
        m.num_kv_heads / min(job.tensor, m.num_kv_heads) > 1
        and m.num_heads != m.num_kv_heads
        and (job.masked or alone)
    )


def repeated(job: Job) -> float:
    """Elements of gathered keys and values that are copied for every head of a rank, in one layer; else 0.

    Both halves of a rank's queries see the keys before them.
    """
    m, c = job.model, job.context
    if c == 1 or job.context_by != "gather" or not _copied(job):
        return 0.0
    seen = job.microbatch * job.sequence_length * ((2 * c + 1) / (2 * c) if m.objective == "causal" else 1.0)
    return 2 * seen * m.num_heads / job.tensor * m.dim_per_head


class Loss(NamedTuple):
    """What head and loss hold in their two fullest moments."""

    forward: float
    """A chunk's logits and the one's before it, and the gradients that are made in the forward pass."""
    backward: float
    """These gradients, and that of the hidden states scaled."""
    gradient: float
    """The weight's gradient that the backward pass makes, in the weight's precision."""
    kept: float
    """The gradients made in the forward pass, which wait for the backward pass."""


def loss_of(job: Job) -> Loss:
    """Of one microbatch: bigtrain.model.loss, with tensor ranks bigtrain.parallel.vocabulary; or our kernels."""
    m, T, b, t = job.model, tokens_of(job), bytes_of(job), job.tensor
    rows = m.vocab_size / t
    weight, hidden = rows * m.width, T * m.width * b
    kept = 4 * weight + hidden
    backward = kept + hidden
    if job.kernels:
        chunk = min(T, max(CHUNK_TOKENS, CHUNK_BYTES // (rows * b)))
        ahead = (
            min(2 * chunk, T) if t > 1 else chunk
        )  # the next chunk's logits are there before this one is done
        within = ahead * rows * b + (b * weight if b == 2 else 0.0)
        return Loss(kept + within, backward, b * weight, kept)
    chunk = min(T, max(CHUNK_TOKENS, CHUNK_LOGITS // rows))
    chunks = -(-T // chunk)
    each = (
        8 if chunks == 1 else 12 + b % 4
    )  # fp32: logits, probabilities, and a chunk's before; 16 bits: the product
    if t > 1:  # the next chunk's logits are there before this one is done
        each = {1: 10, 2: 14}.get(int(chunks), 20)
    forward = 4 * weight + chunk * rows * each + hidden * (2 if t > 1 and job.sequence else 1)
    return Loss(forward, backward, b * weight, kept)


class AtOnce(NamedTuple):
    """What a rank holds of microbatches at one moment, in layers."""

    whole: float
    """Of which all is kept that waits for the backward pass."""
    half: float
    """Of half a backward pass: what products took in and the gradients of what they gave, which wait for the weights'
    gradients; with recompute far more than of a whole one."""
    chunks: float
    """Whole ones, in chunks."""


class Flight(NamedTuple):
    """What a rank holds of microbatches: moments that are the fullest by some weights of wholes and halves."""

    backward: Sequence[AtOnce]
    """In a backward pass: on top comes a layer that is computed again, of a whole one, and what is short-lived."""
    between: Sequence[AtOnce]
    """Between the actions of a schedule with halves."""
    head: AtOnce
    """At the most while the model's last chunk runs."""


def in_layers(job: Job, stage: int, layers: tuple[int, ...]) -> Flight:
    """Of a rank whose chunks have so many layers."""
    p, n = job.pipeline, job.microbatches
    if p == 1 or not (job.zero_bubble or (job.schedule == "interleaved" and len(set(layers)) > 1)):
        whole, half = in_flight(job, stage)
        each = sum(layers) / len(layers)
        once = AtOnce(whole * each, half * each, whole)
        return Flight((once,), (), once)
    small, larger = divmod(n, max(1, n // p))
    rounds = 2 * small + (larger > 0)  # two rounds of microbatches hold the most: parallel.schedule.rounds
    few = min(n, 4 * p if job.schedule == "zbv" else rounds)
    return _counted(job.schedule, p, job.chunks, few, stage, layers)


_orders = functools.lru_cache(maxsize=256)(orders)


@functools.lru_cache(maxsize=1 << 14)
def _counted(
    schedule: str, pipeline: int, chunks: int, microbatches: int, stage: int, layers: tuple[int, ...]
) -> Flight:
    """From the schedule's actions."""
    sizes = dict(zip(chunks_of_rank(schedule, pipeline, chunks)[stage], layers, strict=True))
    head = AtOnce(0.0, 0.0, 0.0)
    whole = half = count = 0
    backward: dict[int, tuple[int, int]] = {}
    between: dict[int, tuple[int, int]] = {}

    def at(moments: dict[int, tuple[int, int]], whole: int, half: int) -> None:
        moments[whole] = max((half, count), moments.get(whole, (0, 0)))

    for action in _orders(schedule, pipeline, chunks, microbatches)[stage]:
        size = sizes[action.chunk]
        if action.kind in ("B", "I"):  # in its first layer, and in its last
            at(backward, whole, half)
            at(backward, whole - size + 1, half + (size - 1) * (action.kind == "I"))
        else:
            whole, count = whole + size * (action.kind == "F"), count + (action.kind == "F")
        if action.chunk == pipeline * chunks - 1 and action.kind != "W":
            head = max(head, AtOnce(whole, half, count))
        half += {"I": size, "W": -size}.get(action.kind, 0)
        if action.kind in ("B", "I"):
            whole, count = whole - size, count - 1
        at(between, whole, half)
    return Flight(_corners(backward), _corners(between), head)


def _corners(most: Mapping[int, tuple[int, int]]) -> tuple[AtOnce, ...]:
    """The upper convex hull of wholes and halves."""
    hull: list[AtOnce] = []
    for x, (y, count) in sorted(most.items()):
        while len(hull) > 1 and (hull[-1].whole - hull[-2].whole) * (y - hull[-2].half) >= (
            hull[-1].half - hull[-2].half
        ) * (x - hull[-2].whole):
            hull.pop()
        hull.append(AtOnce(float(x), float(y), float(count)))
    return tuple(hull)


def in_flight(job: Job, stage: int) -> tuple[float, float]:
    """Chunks of microbatches whose activations a rank of this stage holds at the most: (whole, of half a backward
    pass). The schedules are bigtrain.parallel.schedule's; a test counts their actions."""
    p, v, n = job.pipeline, job.chunks, job.microbatches
    if p == 1:
        return 1.0, 0.0
    if job.schedule == "gpipe":
        return float(n * v), 0.0
    if job.schedule == "1f1b":
        return float(min(n, p - stage)), 0.0
    if job.schedule == "zbv":
        return float(min(2 * n, n + stage + 1, 2 * p)), 0.0
    size = n // max(1, n // p)
    size += n - size * max(1, n // p) > 0  # microbatches of the first round, the largest
    if job.schedule == "interleaved-zb":
        most = min(n * v, (v - 1) * size + p)
        whole = min(n * v, (v - 1) * size + p - stage)
        return float(whole), float(most - whole)
    return float(min(n * v, 2 * (p - stage - 1) + (v - 1) * size + 1)), 0.0  # arXiv 2104.04473, section 2.2
