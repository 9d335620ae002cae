"""What the planner's models take from measurements: few numbers, each with a physical meaning.

Fitted by `python benchmarks/plan.py --fit` to published measurements; `benchmarks/results/plan.json` holds the errors
on rows that were left out of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Shares are of what the data sheet says, between 0 and 1."""

    matmul: float = 0.8077
    """Share of the peak that a large matrix product reaches where the clock holds (Ampere)."""
    hot: float = 0.7717
    """Share of its clock that a card keeps whose power limit the products reach (Hopper and later)."""
    fp8: float = 1.0
    """Share of the doubled speed of 8-bit products that is left after the casts."""
    half: float = 3.333e10
    """FLOPs of a matrix product that takes twice as long as it should: small ones do not fill the card."""
    narrow: float = 56.91
    """Shortest side of a product at which it loses half: slices of tensor ranks are thin."""
    odd: float = 0.4762
    """Speed of a product with a side that is no multiple of 8, against one that is."""
    attention: float = 0.3593
    """Share of the peak of fused attention (FlashAttention-2) on Ampere, of the scores that the mask leaves."""
    attention_hot: float = 0.2056
    """The same on later cards: the kernel was written for Ampere."""
    attention_new: float = 0.5799
    """The same of kernels written for Hopper (cuDNN, FlashAttention-3)."""
    attention_old: float = 0.8801
    """Speed of the first FlashAttention against the second."""
    unfused: float = 14.82
    """Times that attention without a fused kernel reads or writes all its scores, forward and backward."""
    passes: float = 23.51
    """Times that the residual of a token is read or written in a layer outside of products, forward and backward."""
    loss: float = 43.14
    """Bytes read or written for a logit, forward and backward."""
    compiled: float = 0.4611
    """Memory traffic of element-wise work that is left when a compiler fuses it."""
    bandwidth: float = 0.8933
    """Share of the memory bandwidth of element-wise kernels."""
    launch: float = 0.003077
    """Seconds of the CPU to launch the kernels of a layer, forward and backward."""
    link: float = 0.9
    """Share of the bandwidth inside a node that collectives reach."""
    network: float = 0.9
    """Share of the bandwidth between nodes that collectives reach."""
    crowding: float = 0.4435
    """Exponent by which that share falls with the number of nodes in a collective: paths collide."""
    latency: float = 5e-05
    """Seconds of a collective inside a node, however small."""
    hop: float = 3.89e-06
    """Seconds more for every rank of a collective between nodes."""
    hidden: float = 0.4778
    """Share of communication that is hidden where the software overlaps it with compute and there is enough."""
    update: float = 1.0
    """Memory traffic of an update over its least (28 bytes a parameter with AdamW)."""
    fixed: float = 0.006477
    """Seconds of a step that nothing explains: data, logging, synchronisation."""
    straggle: float = 0.002542
    """Loss for every doubling of the nodes: the slowest of many is waited for."""
    spread: float = 0.085
    """Standard deviation of log(measured / planned) on rows that were left out of the fit."""


CONSTANTS = Constants()

CONTEXT_BYTES = 0.6 * 2**30
"""CUDA context, cuBLAS and other workspaces of a process."""
COMMUNICATOR_BYTES = 0.25 * 2**30
"""NCCL's buffers for each group that a rank is in."""
FRAGMENTATION = 0.03
"""Share of the tensors' bytes that the allocator holds and cannot use."""
MEMORY_SPREAD = 0.06
"""Half-width of the memory's interval, as a share of what changes with the batch."""
