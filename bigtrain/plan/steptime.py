"""Seconds of one optimizer step, in parts, from shapes, a layout and a data sheet.

T is the tokens of a microbatch that one rank computes, t, c, p, D the ranks on the axes. A step is the microbatches of
the slowest stage, the bubble of the schedule (`bigtrain.parallel.schedule.bubble_formula`), communication as far as
nothing hides it, and the update. Matrix products are charged by size (small and thin ones do not fill a card), all
else by memory traffic; what is smaller than its kernels' launches takes as long as these.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from bigtrain.config import ModelConfig
from bigtrain.parallel.schedule import bubble_formula
from bigtrain.plan.constants import CONSTANTS, Constants
from bigtrain.plan.flops import flops_per_token, visible_keys
from bigtrain.plan.hardware import Cluster
from bigtrain.plan.job import Job
from bigtrain.plan.memory import job_bytes, layer_parameters, layers_of_stages

PARTS = ("compute", "tensor", "context", "data", "pipeline", "bubble", "optimizer", "fixed")
A100 = 312e12
"""FLOP/s of the card to which shares of the peak refer."""
HOST_BYTES = 20e9
"""Bytes a second between a card and host memory, with the update there: PCIe 4.0 x16 in practice."""


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
        return sum(getattr(self, part) for part in PARTS)

    @property
    def low(self) -> float:
        """Nine steps of ten take longer than this ..."""
        return self.total * math.exp(-1.645 * self.spread)

    @property
    def high(self) -> float:
        """... and nine of ten less than this: together an interval of 90 %."""
        return self.total * math.exp(1.645 * self.spread)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput."""
        return self.tokens / self.total / self.gpus


def time_of(job: Job, cluster: Cluster, constants: Constants | None = None) -> StepTime:
    """The step time of a job on a cluster."""
    k = constants or CONSTANTS
    n, p, v = job.microbatches, job.pipeline, job.chunks
    layer, head = _layer(job, cluster, k), _head(job, cluster, k)
    stages = layers_of_stages(job.model, p, v, job.schedule, job.split, job.sequence_length)
    most = max(sum(c[0] for c in mine) * layer.seconds + any(c[2] for c in mine) * head for mine in stages)
    layers = max(sum(c[0] for c in mine) for mine in stages)
    tensor, context = _inside(job, cluster, k)
    # What a microbatch takes on the average stage: the bubble is the wait for all others.
    each = (job.model.layers * (layer.seconds + tensor + context) + head) / p
    bubble = bubble_formula(job.schedule, p, v, n) * n * each if p > 1 else 0.0
    update, traffic = _update(job, cluster, k, layers)
    hidden = job.overlap * min(traffic, k.overlap * (2 / 3) * most * (n if job.zero == 3 else 1))
    slower = 1 + k.straggle * math.log2(max(1, cluster.nodes))
    flops = flops_per_token(job.model, job.sequence_length).training
    parts = {
        "compute": n * most * slower,
        "tensor": n * layers * tensor * slower,
        "context": n * layers * context * slower,
        "data": traffic - hidden,
        "pipeline": _messages(job, cluster, k) if p > 1 else 0.0,
        "bubble": bubble * slower,
        "optimizer": update,
        "fixed": k.fixed + k.fixed_nodes * math.log2(max(1, cluster.nodes)),
    }
    peak = sum(parts.values()) * job.ranks * cluster.gpu.flops(job.precision)
    mfu = job.tokens_per_step * flops / peak
    again = {"none": 1.0, "full": 4 / 3, "selective": 1 + layer.attention_share / 3}[job.recompute]
    return StepTime(
        **parts,
        tokens=job.tokens_per_step,
        gpus=job.ranks,
        mfu=mfu,
        hfu=mfu * again,
        spread=k.spread * (1 + 0.25 * max(0.0, math.log2(cluster.nodes / 64)) if cluster.nodes > 64 else 1.0),
    )


class Layer(NamedTuple):
    """One block and microbatch on one rank."""

    seconds: float
    """Forward, backward and what is recomputed."""
    attention_share: float
    """Of attention scores in the forward FLOPs."""


def _layer(job: Job, cluster: Cluster, k: Constants) -> Layer:
    """Compute only."""
    T = job.microbatch * job.sequence_length / job.context
    return _layer_of(
        job.model,
        T,
        job.sequence_length,
        job.tensor,
        job.sequence,
        job.recompute,
        job.attention,
        job.precision,
        job.compiled,
        cluster.gpu.flops(job.precision),
        cluster.gpu.flops("bf16"),
        cluster.gpu.bandwidth_gb_s * 1e9,
        k,
    )


@functools.lru_cache(maxsize=1 << 14)
def _layer_of(
    m: ModelConfig,
    T: float,
    S: int,
    t: int,
    sequence: bool,
    recompute: str,
    attention: str,
    precision: str,
    compiled: bool,
    peak: float,
    wide_peak: float,
    bandwidth: float,
    k: Constants,
) -> Layer:
    C, H, K, D, F = m.width, m.num_heads, m.num_kv_heads, m.dim_per_head, m.ffn
    up = 2 if m.activation == "swiglu" else 1
    bytes_ = 4 if precision == "fp32" else 2
    shapes = ((C, (H + 2 * max(K, t)) * D / t), (H * D / t, C), (C, up * F / t), (F / t, C))
    products = sum(_product(T, a, b, peak, k) for a, b in shapes)
    keys = visible_keys(m, S) / S
    scores_flops = 4 * T * keys * H * D / t
    if attention == "flash":
        scores = scores_flops / (math.sqrt(wide_peak * A100) * k.attention)
    else:  # 11 bytes a score: products, softmax of what is seen, dropout and its mask
        scores = 4 * T * S * H * D / t / (wide_peak * k.matmul)
        scores += 5.5 * T * S * H / t * bytes_ / (bandwidth * k.unfused)
    outside = T / t if sequence and t > 1 else T
    traffic = k.passes * outside * C + (3 * up + 1) * T * F / t + 4 * T * (H + 2 * K / min(t, K)) * D / t
    other = traffic * bytes_ / (bandwidth * k.bandwidth) * (0.5 if compiled else 1.0)
    launches = k.launches * (0.5 if compiled else 1.0) * (2.0 if attention == "unfused" else 1.0)
    forward = _longer(products + scores + other, launches)
    more = 2.5 if attention == "flash" else 2.0  # the fused backward pass computes the scores again
    backward = _longer(2 * products + more * scores + 2 * other, 1.5 * launches)
    again = {"none": 0.0, "selective": scores, "full": forward}[recompute]
    share = scores_flops / (scores_flops + 2 * T * sum(a * b for a, b in shapes))
    return Layer(forward + backward + again, share)


def _longer(a: float, b: float) -> float:
    """The longer of two that run beside each other and sometimes wait for each other."""
    return (a**4 + b**4) ** 0.25  # type: ignore[no-any-return]


def _product(rows: float, inner: float, columns: float, peak: float, k: Constants) -> float:
    """Seconds of (rows, inner) @ (inner, columns)."""
    flops = 2 * rows * inner * columns
    narrow = min(rows, inner, columns)
    share = k.matmul * (A100 / peak) ** k.power
    share *= flops / (flops + k.matmul_half * peak / A100) * narrow / (narrow + k.narrow)
    return flops / (peak * share)


def _head(job: Job, cluster: Cluster, k: Constants) -> float:
    """Output projection and loss of a microbatch: three products, six fp32 passes over the logits."""
    m, T = job.model, job.microbatch * job.sequence_length / job.context
    rows = m.vocab_size / job.tensor
    product = 3 * _product(
        T, m.width, rows, cluster.gpu.flops("bf16" if job.precision == "fp8" else job.precision), k
    )
    return product + 6 * 4 * T * rows / (cluster.gpu.bandwidth_gb_s * 1e9 * k.bandwidth)


def _inside(job: Job, cluster: Cluster, k: Constants) -> tuple[float, float]:
    """Seconds a layer and microbatch of tensor and context communication, forward and backward."""
    m, bytes_ = job.model, job_bytes(job)
    T = job.microbatch * job.sequence_length / job.context
    tensor = context = 0.0
    if (t := job.tensor) > 1:
        count = 4 + 2 * (job.recompute == "full")
        rate = _rate(cluster, k, t, 1)
        tensor = count * (2 * (t - 1) / t * T * m.width * bytes_ / rate + _latency(cluster, k, t, t))
    if (c := job.context) > 1:
        rate, wait = _rate(cluster, k, c, job.tensor), _latency(cluster, k, c, c * job.tensor)
        kv = 2 * m.num_kv_heads / min(job.tensor, m.num_kv_heads) * m.dim_per_head
        heads = (2 * m.num_heads / job.tensor * m.dim_per_head + kv) / c
        width, count = (kv, 2) if job.context_by == "gather" else (heads, 2)
        context = (count + (job.recompute == "full")) * ((c - 1) * T * width * bytes_ / rate + wait)
    return tensor, context


def _rate(cluster: Cluster, k: Constants, ranks: int, stride: int) -> float:
    """Bytes a second and rank of a ring of `ranks` ranks, `stride` apart: the slowest link decides.

    All `stride` rings of a node share its network.
    """
    inside = cluster.gpu.link_gb_s * 1e9 * k.link
    if ranks * stride <= cluster.per_node:
        return inside
    return min(inside, cluster.network.gb_s * 1e9 * k.network / min(stride, cluster.per_node))


def _latency(cluster: Cluster, k: Constants, ranks: int, span: int) -> float:
    """Seconds of the smallest collective."""
    between = cluster.network.latency_us * 1e-6 * math.log2(ranks) if span > cluster.per_node else 0.0
    return k.link_latency * (1 + (min(ranks, cluster.per_node) - 1) / 3) + 2 * between


def _update(job: Job, cluster: Cluster, k: Constants, layers: int) -> tuple[float, float]:
    """(seconds of the update, seconds of gradients and weights on their way) in a step."""
    m, replicas = job.model, job.data * job.context
    layer = layer_parameters(m, job.tensor)
    ends = m.vocab_size * m.width / job.tensor * (1 if m.tied or job.pipeline > 1 else 2)
    held = layers * (layer.cut + layer.whole) + ends
    zero = min(job.zero, 1) if job.pipeline > 1 else job.zero
    owned = held / replicas if zero else held
    rate = cluster.gpu.bandwidth_gb_s * 1e9 / k.optimizer_passes
    update = 28 * owned / (HOST_BYTES if job.offload else rate)
    if replicas == 1:
        return update, 0.0
    ring = (replicas - 1) / replicas / _rate(cluster, k, replicas, job.tensor)
    wait = _latency(cluster, k, replicas, replicas * job.tensor)
    weights = 4 if job.precision == "fp32" else 2
    times = job.microbatches if zero >= 2 else 1
    g = job.gradient_bytes
    sent = {0: 2 * g, 1: g + weights, 2: g * times + weights, 3: (g + 2 * weights) * times}[zero]
    calls = (3 * layers if zero == 3 else 4) * times
    return update, sent * held * ring + calls * wait


def _messages(job: Job, cluster: Cluster, k: Constants) -> float:
    """Hidden states between stages: on the way in and out of the pipeline all are waited for."""
    T = job.microbatch * job.sequence_length / job.context
    shared = job.tensor if job.sequence else 1
    size = T * job.model.width * job_bytes(job) / shared
    between = job.ranks > cluster.per_node
    rate = (
        cluster.network.gb_s * 1e9 * k.network / cluster.per_node
        if between
        else cluster.gpu.link_gb_s * 1e9 * k.link
    )
    hop = size / rate + k.link_latency + (cluster.network.latency_us * 1e-6 if between else 0.0)
    return 2 * hop * (job.pipeline - 1) + 2 * k.hop * job.microbatches * job.chunks * hop
