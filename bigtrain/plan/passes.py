"""What bigtrain's blocks read and write of a microbatch outside of products and attention, counted from their code.

In numbers of elements, of one block on one rank. T is the tokens of a microbatch that a rank computes, t the tensor
ranks. tests/test_plan_passes.py compares with the operations of executed code.
"""

from __future__ import annotations

from typing import NamedTuple

from bigtrain.plan.activations import repeated, tokens_of
from bigtrain.plan.job import Job


class Passes(NamedTuple):
    """Elements read or written."""

    forward: float
    once: float
    """In the forward pass, and not again where a checkpoint repeats it."""
    backward: float
    core: float = 0.0
    """Of `forward`, what leads from queries, keys and values to attention: what selective recomputation repeats."""


def in_blocks(job: Job) -> Passes:
    """With our kernels: norms take in the residual and read and write 6 and 7 times its size, RMSNorm or LayerNorm."""
    m, t, T = job.model, job.tensor, tokens_of(job)
    whole = T * m.width
    shared = whole / t if job.sequence else whole
    o, kv = _heads(job)
    heads, ffn, gated = o + kv / 2, T * m.ffn / t, m.activation == "swiglu"
    # SwiGLU reads and writes 3 and 5 times the inner width, GELU 2 and 3; of queries and keys the rotation 2 and 2, a
    # norm 2 and 3.
    forward = 6 * shared + (3 if gated else 2) * ffn
    backward = 7 * shared + (5 if gated else 3) * ffn
    backward += 3 * shared + 2 * shared  # two gradients of the residual added up; the attention's in order
    if (
        t == 1
    ):  # what products that share their input give for it is added up; with tensor ranks as it is sent
        backward += (9 if gated else 6) * whole
    if m.position == "rope":
        forward, backward = forward + 2 * heads, backward + 2 * heads
        backward += 0 if job.context > 1 and job.context_by == "gather" else 2 * o
    if m.qk_norm:
        forward, backward = forward + 2 * heads, backward + 3 * heads
    if m.bias or m.qkv_bias:  # sums of gradients
        backward += o + kv
    if m.bias:
        backward += (2 if gated else 1) * ffn + 2 * shared
        forward += 4 * shared if t > 1 else 0.0
        if job.zero == 3:  # DeepSpeed's products add it in a pass of its own
            forward += 2 * (o + kv + (2 if gated else 1) * ffn + (2 * whole if t == 1 else 0.0))
    return Passes(forward, 3 * shared, backward)


def in_exchange(job: Job) -> Passes:
    """To bring keys or heads together over a context axis, and keys to every head."""
    if job.context == 1:
        return Passes(0.0, 0.0, 0.0)
    m, c, t = job.model, job.context, job.tensor
    o, kv = _heads(job)
    if job.context_by == "gather":
        # Stacked, gathered, put in order; backward slices' gradients are padded and added up.
        copies = repeated(job)
        core = (2 + 4 * c) * kv + 2 * copies
        backward = (10 * c + 0.5) * kv + 6 * o + copies * (1 + m.num_kv_heads / m.num_heads)
        return Passes(core + 2 * o, 0.0, backward, core)
    K = max(m.num_kv_heads, t) / t
    times = max(1.0, c / K)
    packed = o + kv * times
    # Rows of one sequence need not be brought together.
    rows = 2 if job.microbatch > 1 else 0
    core = (4 + rows) * packed + (2 * times * kv if times > 1 else 0.0)
    backward = (6 + rows) * packed + (2 + rows) * o + ((times + 1) * kv if times > 1 else 0.0)
    return Passes(core + (2 + rows) * o, 0.0, backward, core)


def _heads(job: Job) -> tuple[float, float]:
    """Elements of the queries, and of keys and values together."""
    m, t, T = job.model, job.tensor, tokens_of(job)
    return T * m.num_heads * m.dim_per_head / t, 2 * T * max(m.num_kv_heads, t) / t * m.dim_per_head
