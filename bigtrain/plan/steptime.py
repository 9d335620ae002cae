"""Seconds of one optimizer step, in parts, from shapes, a layout and a data sheet.

T is the tokens of a microbatch that one rank computes, t, c, p, D the ranks on the axes. A step is the microbatches of
the slowest stage, the bubble of the schedule (`bigtrain.parallel.schedule.bubble_formula`), communication as far as
nothing hides it, and the update. Matrix products are charged by size (small and thin ones do not fill a card), all
else by memory traffic; what is smaller than its kernels' launches takes as long as these. Collectives are rings:
(n - 1) / n of the bytes for each gather or reduce-scatter, on the slowest link between two of the ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bigtrain.config import ModelConfig
from bigtrain.parallel.schedule import bubble_formula
from bigtrain.plan import messages
from bigtrain.plan.activations import bytes_of
from bigtrain.plan.constants import CONSTANTS, Constants
from bigtrain.plan.flops import flops_per_token, parameters, visible_keys
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.job import Job
from bigtrain.plan.memory import layer_parameters, layers_of_stages
from bigtrain.plan.passes import Passes, in_blocks, in_exchange

PARTS = ("compute", "tensor", "context", "data", "pipeline", "bubble", "optimizer", "fixed")
HOST_BYTES = 20e9
"""Bytes a second between a card and host memory, with the update there: PCIe 4.0 x16 in practice."""
HIDDEN_SPREAD = 0.29
"""Standard deviation of a share of which only is known that it lies between 0 and 1: how much of what may run beside
computing does. Frameworks differ in it more than in anything else."""
LSTM_SPREAD = 0.7
"""A factor of three either way: no measurement of an LSTM was at hand."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. tensor, context, data and pipeline are communication that nothing hides."""

    compute: float
    tensor: float
    context: float
    data: float
    pipeline: float
    bubble: float
    optimizer: float
    fixed: float
    tokens: int
    """Of the whole step, all ranks."""
    gpus: int
    mfu: float
    """Model FLOPs, every query times every key, over the peak (Chowdhery et al. 2022, arXiv 2204.02311)."""
    hfu: float
    """The same with what is recomputed."""
    spread: float
    """Standard deviation of the logarithm of the error."""

    @property
    def total(self) -> float:
        """The whole step."""
        communication = self.tensor + self.context + self.data + self.pipeline
        return self.compute + communication + self.bubble + self.optimizer + self.fixed

    @property
    def low(self) -> float:
        """Nineteen steps of twenty take longer than this ..."""
        return self.total * math.exp(-1.645 * self.spread)

    @property
    def high(self) -> float:
        """... and nineteen of twenty less than this: together an interval of 90 %."""
        return self.total * math.exp(1.645 * self.spread)

    def times(self, factor: float) -> StepTime:
        """With every part so many times as long."""
        longer = {part: factor * getattr(self, part) for part in PARTS}
        return replace(self, **longer, mfu=self.mfu / factor, hfu=self.hfu / factor)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput."""
        return self.tokens / self.total / self.gpus


def time_of(job: Job, cluster: Cluster, constants: Constants | None = None) -> StepTime:
    """The step time of a job on a cluster."""
    k = constants or CONSTANTS
    n, p = job.microbatches, job.pipeline
    ours = job.software == "bigtrain"
    work = _work(job)
    rates = rates_of(job, cluster, k)
    computed, again = _layer(work, job, rates, k)
    tensor, context = _inside(work, job, cluster, k)
    each = max(computed + tensor + context, _launches(work, job, k))  # the card may wait for the CPU
    # Our kernels write logits, read them, put the gradient in their place (2), and two products read that.
    head = (
        _product(work.head, rates.wide * (k.odd if work.odd else 1.0), k)
        + work.logits * (6 * bytes_of(job) if job.kernels else k.loss) / rates.bandwidth
    )
    stages = _loads(job.model, p, job.chunks, job.schedule, job.split, job.sequence_length)
    times = [layers * each + (head if last else 0.0) for layers, last in stages]
    most = max(times)
    added = _added(job, rates, max(layers for layers, _ in stages)) if ours else 0.0
    layers = stages[times.index(most)][0]
    bubble = 0.0
    if p > 1 and job.schedule == "1f1b":
        bubble = _waiting(times, n, 1 / (3 + again))
    elif p > 1:  # a rank waits for what the others do before and after it
        bubble = bubble_formula(job.schedule, p, job.chunks, n) * n * (sum(times) - most) / (p - 1)
    update, traffic, room = _update(job, cluster, layers, k)
    hidden = _hidden(job, layers, traffic, room * most, k)
    slower = 1 + k.straggle * math.log2(cluster.nodes)
    parts = {
        "compute": (n * (most - layers * (tensor + context)) + added) * slower,
        "tensor": n * layers * tensor * slower,
        "context": n * layers * context * slower,
        "data": traffic - hidden,
        "pipeline": _messages(work, job, cluster, k) if p > 1 else 0.0,
        "bubble": bubble * slower,
        "optimizer": update,
        "fixed": k.fixed,
    }
    total = sum(parts.values())
    flops = job.tokens_per_step * flops_per_token(job.model, job.sequence_length).training
    mfu = flops / (total * job.ranks * cluster.gpu.flops(job.precision))
    beside = hidden / k.hidden + (parts["tensor"] / (1 - k.hidden) if job.tensor_overlap else 0.0)
    return StepTime(
        **parts,
        tokens=job.tokens_per_step,
        gpus=job.ranks,
        mfu=mfu,
        hfu=mfu * (1 + again / 3),
        spread=_spread(job, cluster, beside / total, k),
    )


def _spread(job: Job, cluster: Cluster, beside: float, k: Constants) -> float:
    """Standard deviation of the logarithm of the error; `beside`: communication that may be hidden, over the step."""
    if job.model.kind == "lstm":
        return LSTM_SPREAD
    known = k.spread * (1 + 0.25 * max(0.0, math.log2(cluster.nodes / 64)))
    return math.hypot(known, HIDDEN_SPREAD * beside)


@functools.lru_cache(maxsize=4096)
def _loads(*pipeline: Any) -> tuple[tuple[int, bool], ...]:
    """For every stage its layers, and whether it has the head; of the arguments of `layers_of_stages`."""
    return tuple((sum(c[0] for c in mine), any(c[2] for c in mine)) for mine in layers_of_stages(*pipeline))


def _waiting(times: Sequence[float], microbatches: int, forward: float) -> float:
    """Seconds that the slowest stage of a 1F1B pipeline waits; `forward`: share of a stage's time.

    For the stages before it in full. While the first microbatch is in those behind it, it runs forward passes of
    others, and backward passes while the last one is there. With stages that take equally long, and with one
    microbatch, this is what all others take.
    """
    slowest = times.index(max(times))
    behind = sum(times[slowest + 1 :])
    others = min(microbatches, len(times) - slowest) - 1
    beside = [others * share * times[slowest] for share in (forward, 1 - forward)]
    waits = sum(times[:slowest]) + sum(max(0.0, behind - run) for run in beside)
    return min(waits, sum(times) - times[slowest])


def _work(job: Job) -> Work:
    T, S = job.microbatch * job.sequence_length / job.context, job.sequence_length
    apart = job.software == "bigtrain"
    shape = (job.model, T, S, job.tensor, job.sequence, job.attention)
    return work_of(*shape, seen=_computed_keys(job), apart=apart)


def _computed_keys(job: Job) -> float:
    """Keys of a query that fused attention computes although a mask hides some; 0: those that are seen."""
    if not job.masked:
        return 0.0
    if job.context > 1 and job.context_by == "gather" and job.model.objective == "causal":
        return job.sequence_length * (2 * job.context + 1) / (4 * job.context)  # none behind a rank's queries
    return float(job.sequence_length)


class Work(NamedTuple):
    """What one layer and one microbatch make a rank do: numbers of elements, and FLOPs of the forward pass."""

    products: tuple[tuple[float, float], ...]
    """(FLOPs, shortest side) of the matrix products."""
    scores: float
    """FLOPs of fused attention: of what a query sees, or where a mask says that, of all."""
    squares: float
    """Scores that attention without a fused kernel keeps; 0 with one."""
    square_flops: float
    """FLOPs of these."""
    residual: float
    """The residual stream."""
    inner: float
    """What feed-forward and attention read or write element by element: a third of forward and backward."""
    casts: float
    """What products take in, which a precision of 8 bits casts first."""
    head: tuple[float, float]
    """The output projection, as products."""
    logits: float
    odd: bool
    """Whether the head has rows that are no multiple of 8."""
    message: float
    """The hidden states of all tensor ranks."""
    queries: float
    kv: float
    """Keys and values."""
    steps: float
    """Kernels one after another that a rank launches more than once a layer: the LSTM's, of every position."""


@functools.lru_cache(maxsize=1 << 15)
def work_of(
    m: ModelConfig,
    T: float,
    S: int,
    t: int,
    sequence: bool,
    attention: str,
    seen: float = 0.0,
    apart: bool = False,
) -> Work:
    """T tokens of sequences of S, on one of t tensor ranks. seen: keys of a query that fused attention computes, where
    that is not what the model lets it see. apart: every matrix is a product of its own, as in bigtrain; others join
    those that share their input."""
    C, V = m.width, m.vocab_size
    head, odd = (2 * T * C * V / t, min(T, C, V / t)), V % t == 0 and V // t % 8 != 0
    if m.kind == "lstm":
        gates = ((8 * T * C * C, min(T, C)), (8 * T * C * C, min(T / S, C)))
        return Work(gates, 0, 0, 0, T * C, 12 * T * C, 10 * T * C, head, T * V, odd, T * C, 0, 0, S / 100)
    H, K, D, F = m.num_heads, m.num_kv_heads, m.dim_per_head, m.ffn
    up = 2 if m.activation == "swiglu" else 1
    kv = 2 * max(K, t) / t * D  # more ranks than kv heads hold copies
    shapes: tuple[tuple[float, float], ...] = (
        (C, H * D / t + kv),
        (H * D / t, C),
        (C, up * F / t),
        (F / t, C),
    )
    if apart:
        shapes = ((C, H * D / t), (C, kv / 2), (C, kv / 2), (H * D / t, C), *((C, F / t),) * up, (F / t, C))
    flash = attention != "unfused"
    inner = T * ((3 * up + 1) * F / t + 2 * (H * D / t + kv))
    return Work(
        products=tuple((2 * T * a * b, min(T, a, b)) for a, b in shapes),
        scores=4 * T * (seen or visible_keys(m, S) / S) * H * D / t if flash else 0.0,
        squares=0.0 if flash else T * S * H / t,
        square_flops=0.0 if flash else 4 * T * S * H * D / t,
        residual=T * C / (t if sequence else 1),
        inner=inner,
        casts=T * sum(a + b for a, b in shapes),
        head=head,
        logits=T * V / t,
        odd=odd,
        message=T * C,
        queries=T * H * D / t,
        kv=T * kv,
        steps=0.0,
    )


class Rates(NamedTuple):
    """What a card does in a second, with the constants in."""

    products: float
    """FLOPs."""
    wide: float
    """FLOPs of products that 8 bits are not enough for."""
    scores: float
    """FLOPs of fused attention."""
    bandwidth: float
    """Bytes."""


def rates_of(job: Job, cluster: Cluster, k: Constants) -> Rates:
    """What a job's card does in a second."""
    gpu = cluster.gpu
    hot = "fp8" in gpu.peak_tflops  # Hopper and later: the power limits the clock
    share = k.matmul * (k.hot if hot else 1.0)
    wide = gpu.flops("bf16" if job.precision == "fp8" else job.precision)
    narrow = gpu.flops(job.precision) * (k.fp8 if hot and job.precision == "fp8" else 1.0)
    scores = k.attention
    if hot:
        scores = k.attention_new if "Core" in job.software else k.attention_hot
    if "llm-foundry" in job.software:  # of 2023
        scores *= k.attention_old
    return Rates(narrow * share, wide * share, wide * scores, gpu.bandwidth_gb_s * 1e9 * k.bandwidth)


def _product(work: tuple[float, float], rate: float, k: Constants) -> float:
    """Seconds of a matrix product and the two of its backward pass."""
    flops, side = work
    return 3 * (flops + k.half) / rate * (1 + k.narrow / side)


def _layer(work: Work, job: Job, rates: Rates, k: Constants) -> tuple[float, float]:
    """(seconds of a layer forward and backward, share of the forward pass that is computed again)."""
    bytes_ = bytes_of(job)
    products = 0.0
    for one in work.products:
        products += _product(one, rates.products, k)
    passes = _passes(work, job, k)
    each = bytes_ / rates.bandwidth * (k.compiled if job.compiled else 1.0)
    once, core = passes.once * each, passes.core * each
    traffic, ahead = (passes.forward + passes.backward) * each, passes.forward * each
    if job.precision == "fp8":  # read as 16 bits, written as 8, as it is and transposed
        casts = 4 * work.casts / rates.bandwidth * (k.compiled if job.compiled else 1.0)
        traffic, ahead = traffic + casts, ahead + casts / 3
    if work.squares:  # products of a head are small: half as fast again
        scores = (
            1.5 * work.square_flops / rates.wide + work.squares * k.unfused * bytes_ / rates.bandwidth / 3
        )
        backward = 2 * scores
    else:  # the fused backward pass computes the scores again: arXiv 2307.08691
        scores = work.scores / rates.scores
        backward = 2.5 * scores
    forward = products / 3 + ahead + scores
    again = 0.0
    if job.recompute == "full":
        again = forward
        if job.software == "bigtrain" and job.zero != 3 and job.tensor == 1 and not job.zero_bubble:
            # torch's checkpoint stops before the last product, which nothing backward needs; not under ZeRO 3's hooks,
            # nor where that product is one function with its communication or the halves of its gradient
            again -= _product(work.products[-1], rates.products, k) / 3
    elif job.recompute == "selective":
        again = scores + core
        if job.software == "torchtitan":  # every other product
            again = products / 6 + ahead
    return products + traffic + once + scores + backward + again, again / (forward + once)


def _passes(work: Work, job: Job, k: Constants) -> Passes:
    """Elements that a layer reads and writes outside of products: of ours counted, of others by what was measured."""
    rough = k.passes * work.residual + 3 * work.inner
    others = Passes(rough / 3, 0.0, 2 * rough / 3)
    if job.software != "bigtrain" or job.model.kind == "lstm":
        return others
    blocks, exchange = in_blocks(job) if job.kernels else others, in_exchange(job)
    return Passes(*(sum(both) for both in zip(blocks, exchange, strict=True)))


def launches(job: Job, k: Constants) -> float:
    """Seconds of the CPU for the kernels of a layer and microbatch: what keeps a card waiting where work is small."""
    return _launches(_work(job), job, k)


def _launches(work: Work, job: Job, k: Constants) -> float:
    times = 4 / 3 if job.recompute == "full" else 1.0
    if job.tensor > 1:
        times *= 1.1
    if work.squares and "Megatron" in job.software and job.microbatch * job.model.num_heads // job.tensor % 4:
        times *= 1.45  # its fused softmax takes heads by fours
    return k.launch * (times + work.steps)


def _inside(work: Work, job: Job, cluster: Cluster, k: Constants) -> tuple[float, float]:
    """Seconds a layer and microbatch of tensor and context communication, forward and backward."""
    tensor = context = 0.0
    t, c, bytes_ = job.tensor, job.context, bytes_of(job)
    if t > 1:
        # Two all-reduces each way, or as much in gathers; Megatron's shared norms gather their inputs again.
        ours = job.software == "bigtrain"
        count = 4 + 2 * (job.recompute == "full") + 0.5 * job.sequence
        if ours:  # a checkpoint stops before the last one
            count = 4 + 1.5 * (job.recompute == "full")
        sent = 2 * (t - 1) / t * work.message * bytes_ / link_rate(cluster, k, t, 1)
        tensor = count * (sent + (1 + (ours and job.sequence)) * latency(cluster, k, t, t))
        if job.tensor_overlap:
            tensor *= 1 - k.hidden
    if c > 1:
        # Ulysses copies keys where ranks outnumber their heads.
        copies = max(1.0, c * t / max(job.model.num_kv_heads, t))
        gather = job.context_by == "gather"
        width = work.kv if gather else (2 * work.queries + copies * work.kv) / c
        sent = (c - 1) * width * bytes_ / link_rate(cluster, k, c, t)
        start = latency(cluster, k, c, c * t)
        context = (3 + (job.recompute == "full")) * (sent + start)
        if job.software == "bigtrain" and gather:
            # The gathered keys are kept for the backward pass, which sends their gradients only.
            context = (2 + (job.recompute != "none")) * (sent + start)
        elif (
            job.software == "bigtrain"
        ):  # there and back in two messages each; attention alone needs the first again
            first = 1 - work.queries / (2 * work.queries + copies * work.kv)
            more, starts = {"none": (0.0, 0), "selective": (first, 1), "full": (1.0, 2)}[job.recompute]
            context = (2 + more) * sent + (4 + starts) * start
    return tensor, context


def link_rate(cluster: Cluster, k: Constants, ranks: int, stride: int) -> float:
    """Bytes a second and rank of a ring of `ranks` ranks, `stride` apart: the slowest link decides.

    All `stride` rings of a node share its network.
    """
    inside = cluster.gpu.link_gb_s * 1e9 * k.link
    nodes = ranks * stride / cluster.per_node
    if nodes <= 1:
        return inside
    share = k.network if cluster.network.rails or nodes <= 2 else k.network * (2 / nodes) ** k.crowding
    return min(inside, cluster.network.gb_s * 1e9 * share / min(stride, cluster.per_node))


def latency(cluster: Cluster, k: Constants, ranks: int, span: int) -> float:
    """Seconds of the smallest collective."""
    return k.latency * math.log2(ranks) + (k.hop * ranks if span > cluster.per_node else 0.0)


GRADIENT_BYTES = {0: (10, 22), 1: (26, 33), 2: (20, 5), 3: (30, 0)}
"""By ZeRO level, in 16 bits: bytes a parameter that an engine reads and writes of gradients in every microbatch, and
once a step: conversion, adding up in fp32, buckets, norm, clipping; level 3 also copies the weights that it gathers.
Counted in the logs of dry runs, which tests/test_plan_replay.py compares with."""


def _added(job: Job, rates: Rates, layers: int) -> float:
    """Seconds of a step for what becomes of gradients between the backward pass and the update."""
    if job.data * job.context == 1:  # added up in fp32: read, and read and written
        each, once = bytes_of(job) + 8, -bytes_of(job) - 8
    else:
        each, once = GRADIENT_BYTES[_level(job)]
    return (job.microbatches * each + once) * _held(job, layers) / rates.bandwidth


def _level(job: Job) -> int:
    """The ZeRO level that runs: with pipelines bigtrain shards no more than the optimizer's state."""
    return min(job.zero, 1) if job.pipeline > 1 and job.software == "bigtrain" else job.zero


def _held(job: Job, layers: int) -> float:
    """Parameters of a rank with so many layers."""
    m = job.model
    if m.kind != "transformer":
        return float(parameters(m))
    layer = layer_parameters(m, job.tensor)
    return layers * (layer.cut + layer.whole) + _tables(job)


def _tables(job: Job) -> float:
    """Parameters of a rank's embedding and head."""
    m = job.model
    return m.vocab_size * m.width / job.tensor * (1 if m.tied or job.pipeline > 1 else 2)


def _update(job: Job, cluster: Cluster, layers: int, k: Constants) -> tuple[float, float, float]:
    """(seconds of the update, of gradients and weights on their way, microbatches whose compute may hide these)."""
    replicas, n, held = job.data * job.context, job.microbatches, _held(job, layers)
    zero, ours = _level(job), job.software == "bigtrain"
    rate = cluster.gpu.bandwidth_gb_s * 1e9 * k.bandwidth / k.update
    update = 28 * (held / replicas if zero else held) / (HOST_BYTES if job.offload else rate)
    if replicas == 1:
        return update, 0.0, 0.0
    g, w = job.gradient_bytes, bytes_of(job)
    # DeepSpeed's bf16 optimizer sums gradients on all ranks at level 1. At level 2 it sends each owner its part of a
    # bucket (an eighth of a small model).
    owned = (g * n * replicas / (replicas - 1) + w, 0, n)
    calls: float
    joined = ours and job.precision in ("bf16", "fp8")  # matrices and norms, each in one message
    sent, calls, room = {
        0: (2 * g, 2 * layers, 2 / 3),
        1: ((2 * g if joined else g) + w, 4 if joined else 2 * layers, 1.0),
        2: owned if ours else (g * n + w, 2 * layers * n, n),
        3: ((g + 2 * w) * n, 3 * (layers + 1) * n, n),
    }[zero]
    if ours and job.model.kind == "transformer" and zero >= 2:
        if zero == 2:
            calls = n * messages.level_2(job.model, job.tensor, replicas)
        else:
            again = job.recompute == "full"
            calls = n * messages.level_3(job.model, job.tensor, again) + messages.small(job.model)
    ring = (replicas - 1) / replicas / link_rate(cluster, k, replicas, job.tensor)
    return update, sent * held * ring + calls * latency(cluster, k, replicas, replicas * job.tensor), room


def _hidden(job: Job, layers: int, traffic: float, room: float, k: Constants) -> float:
    """Seconds of gradients and weights on their way that computing hides, which takes `room`."""
    if not job.overlap:
        return 0.0
    if job.software == "bigtrain":
        if _level(job) in (1, 2):  # DeepSpeed's overlap_comm is on at level 3 only
            return 0.0
        if _level(job) == 3:  # nothing is computed while the tables are gathered
            traffic *= 1 - _tables(job) / _held(job, layers)
    return k.hidden * min(traffic, room)


def _messages(work: Work, job: Job, cluster: Cluster, k: Constants) -> float:
    """Hidden states between stages: on the way in and out of the pipeline, and one each way for every microbatch."""
    size = work.message * bytes_of(job) / (job.tensor if job.sequence else 1)
    if job.tensor * job.context * job.data >= cluster.per_node:
        rate = cluster.network.gb_s * 1e9 * k.network / cluster.per_node
    else:
        rate = cluster.gpu.link_gb_s * 1e9 * k.link
    hop = size / rate + k.latency
    return 2 * hop * (job.pipeline - 1) + 2 * (1 - k.hidden) * job.microbatches * job.chunks * hop
