"""What an engine holds for the parameters of a rank, and the moments at which a rank is fullest. All in bytes."""

from __future__ import annotations

from typing import NamedTuple

from bigtrain.plan.activations import bytes_of
from bigtrain.plan.job import Job

BUCKET_ELEMENTS = 100_000_000
LIVE_ELEMENTS, PREFETCH_ELEMENTS = 1_000_000_000, 50_000_000
"""What bigtrain.engine.zero tells DeepSpeed; a test holds them equal (that module needs torch)."""
JOINED_ELEMENTS = 500_000_000
"""DeepSpeed's buffered_allreduce_fallback, of which bigtrain.optim.parameter_groups tells more."""
REPLICA_BUCKET_BYTES = 25 << 20
"""bigtrain.engine.replica's; the same test."""


class Held(NamedTuple):
    """Parameters of a rank, in numbers."""

    parameters: float
    layer: float
    """Of one block."""
    table: float
    """Of the embedding, or of the head."""
    layers: int
    first: bool
    """Whether it has the embedding."""
    last: bool
    """Whether it has the head."""


class Limits(NamedTuple):
    """Elements that ZeRO 3 holds and reads ahead at most, and that ZeRO sends at once."""

    live: float
    ahead: float
    bucket: float


class State(NamedTuple):
    """What stays, and what comes and goes with parameters."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    """Always."""
    backward: float
    """Besides, in the backward pass of a layer."""
    head: float
    """Besides, while head and loss run."""
    late: float
    """16-bit gradients of all parameters, where an engine keeps them until a backward pass is done."""
    joined: float = 0.0
    """A copy of all gradients, while they are sent."""


class Moment(NamedTuple):
    """What is held at one of the fullest moments, besides what stays."""

    gradients: float
    activations: float
    logits: float
    buffers: float


class Peak(NamedTuple):
    """The fullest moment of a rank."""

    state: State
    moment: Moment


def moments_of(job: Job, held: Held) -> float:
    """fp32 moments: two of AdamW, one of SGD's momentum, of Muon one of matrices and AdamW's of the rest."""
    P = held.parameters
    match job.optimizer:
        case "muon":
            blocks = held.layers * held.layer
            return 4 * blocks + 8 * (P - blocks)
        case "sgd":
            return 4 * P
        case "plain sgd":
            return 0.0
    return 8 * P


def state_of(job: Job, held: Held) -> State:
    """By precision, ZeRO level and pipeline: bigtrain.engine's classes, and DeepSpeed as they set it up."""
    P, replicas, b = held.parameters, job.data * job.context, bytes_of(job)
    zero = min(job.zero, 1) if job.pipeline > 1 else job.zero
    share = 1 / replicas if zero else 1.0
    masters = 4 * P if b == 2 or zero else 0.0
    optimizer = 0.0 if job.offload else (masters + moments_of(job, held)) * share
    live, ahead, bucket = zero_limits(P, held.layer)
    if zero == 0:
        sent = 4 * held.layer / 3 + REPLICA_BUCKET_BYTES if replicas > 1 else 0.0
        return State(b * P, 4 * P, optimizer, 0.0, sent, 0.0, 0.0)
    if zero == 1 and job.precision in ("bf16", "fp8"):
        late = b * P if job.pipeline == 1 else 0.0  # in a pipeline each is added up and dropped at once
        joined = 4 * P if P < JOINED_ELEMENTS else 0.0
        return State(b * P, 4 * P, optimizer, 0.0, 0.0, 0.0, late, joined)
    if zero == 1:
        return State(b * P, 4 * P, optimizer, 4 * bucket, 0.0, 0.0, 0.0)
    if zero == 2:
        own = max(4 * P * share, 4 * held.table if b == 4 else 0.0)
        return State(b * P, own, optimizer, 0.0, b * bucket, 0.0, 0.0)
    # While the head runs, norm and head have read ahead: about a block.
    head = max(held.table, min(live, held.table + held.layer + ahead))
    return State(b * P * share, 4 * P * share, optimizer, 4 * bucket, b * (live + ahead), b * head, 0.0)


def zero_limits(elements: float, block: float) -> Limits:
    """See bigtrain.engine.zero.deepspeed_config."""
    return Limits(
        min(LIVE_ELEMENTS, max(elements // 4, 2 * block)),
        min(PREFETCH_ELEMENTS, max(elements // 8, block)),
        min(BUCKET_ELEMENTS, max(elements // 8, 1)),
    )
