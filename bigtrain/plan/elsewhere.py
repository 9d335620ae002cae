"""Memory of other frameworks' jobs, whose published figures the planner is compared with: their conventions."""

from __future__ import annotations

from bigtrain.plan.activations import bytes_of, in_flight, tokens_of
from bigtrain.plan.job import Job
from bigtrain.plan.states import Held, Moment, Peak, State


def elsewhere(job: Job, stage: int, held: Held, chunks: int) -> Peak:
    """The fullest moment of a rank of `stage`, which has so many chunks."""
    layer, waiting = _layer(job)
    whole, half = in_flight(job, stage)
    activations = (whole + half) * held.layers / chunks * waiting
    T, b, C = tokens_of(job), bytes_of(job), job.model.width
    fsdp = (
        2 * held.layer * (b + 4) if job.zero == 3 else 0.0
    )  # two layers whole, the gradients of one in fp32
    passing = b * T * (3 * job.model.ffn / job.tensor + 2 * C)
    backward = Moment(0.0, activations + layer - waiting, 0.0, fsdp + passing)
    if not held.last:
        return Peak(_state(job, held), backward)
    logits = T * job.model.vocab_size / job.tensor * _bytes_of_logit(job)
    loss = Moment(0.0, activations, logits, fsdp)
    if job.software == "torchtitan":  # it tells what the allocator reserved: room for both moments
        return Peak(_state(job, held), backward._replace(logits=logits))
    return Peak(_state(job, held), max(loss, backward, key=sum))


def _state(job: Job, held: Held) -> State:
    P, replicas, b = held.parameters, job.data * job.context, bytes_of(job)
    share = 1 / replicas if job.zero else 1.0
    gradients = 4.0 * (share if job.zero >= 2 else 1.0)
    if job.software == "nanotron":  # 16-bit gradients besides the fp32 sums, which one replica does without
        gradients = 2.0 if replicas == 1 else 6.0
    weights = b * P * (share if job.zero == 3 else 1.0)
    return State(weights, gradients * P, 12 * P * share, 0.0, 0.0, 0.0, 0.0)


def _bytes_of_logit(job: Job) -> float:
    """16-bit and fp32 logits and their gradients, all of a microbatch at once; a compiler fuses some."""
    if "Megatron" in job.software:
        return 11.0 if "fused loss" in job.software else 7.0  # the fused one keeps fp32 copies
    return 9.0 if job.compiled else 11.0


def _layer(job: Job) -> tuple[float, float]:
    """What a block keeps: (for its backward pass, while it waits)."""
    m, t, T, b = job.model, job.tensor, tokens_of(job), bytes_of(job)
    C, H, K, D, F = m.width, m.num_heads, m.num_kv_heads, m.dim_per_head, m.ffn
    megatron = "Megatron" in job.software
    outside = T / t if job.sequence and t > 1 else T
    entered = outside if megatron else T  # Megatron gathers what enters a projection again
    heads = D * (2 * H + 2 * K) / t
    wide = (4 if m.activation == "swiglu" else 2) * F / t
    layer = b * (2 * outside * C + 2 * entered * C + T * heads + T * wide) + 4 * T * H / t
    if megatron and m.activation == "gelu":
        layer += 2 * outside * C  # masks of two dropouts
    if job.attention == "unfused" and job.recompute != "selective":
        layer += 5 * H / t * T * job.sequence_length  # softmax, dropout's mask (a byte) and its result
    if job.recompute == "selective" and not megatron:
        layer *= 0.5  # torchtitan keeps every other product
    return layer, b * outside * C if job.recompute == "full" else layer
