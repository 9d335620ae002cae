"""What the planner's models take from measurements: few numbers, each with a physical meaning.

Fitted by `python benchmarks/plan.py --fit` to published measurements; `benchmarks/results/plan.json` holds the errors
on rows that were left out of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Shares are of what the data sheet says, between 0 and 1."""

    matmul: float = 0.81
    """Share of the peak that a large matrix product reaches."""
    power: float = 0.113
    """What reaches a share s of an A100's 312 TFLOP/s reaches s (312 / peak)^power of a larger peak: power and memory
    have not grown as fast."""
    matmul_half: float = 1.86e10
    """FLOPs of a product that reaches half of that: smaller ones do not fill the card."""
    narrow: float = 197
    """Shortest side of a product at which it loses half: slices of tensor ranks are thin."""
    attention: float = 0.325
    """Share of the peak of fused attention on the scores that a query sees, on an A100; its rate grows as the root of
    the peak."""
    unfused: float = 0.612
    """Share of the memory bandwidth that attention with all its scores in memory reaches."""
    bandwidth: float = 0.8
    """Share of the memory bandwidth of element-wise kernels."""
    passes: float = 7.2
    """Times that the residual width of a token is read or written in a layer's forward pass, outside of products."""
    launches: float = 0.0006
    """Seconds of the CPU to launch the kernels of a layer's forward pass."""
    link: float = 0.95
    """Share of the bandwidth inside a node that collectives reach."""
    network: float = 0.95
    """Share of the bandwidth between nodes that collectives reach."""
    link_latency: float = 4.3e-05
    """Seconds of a collective inside a node, however small."""
    hop: float = 0.277
    """Share of the messages between pipeline stages that is waited for while the pipeline is full."""
    overlap: float = 0.139
    """Share of the communication of gradients and weights that is hidden behind compute, where there is enough."""
    optimizer_passes: float = 1.21
    """Memory traffic of an update over its least (28 bytes a parameter with AdamW)."""
    fixed: float = 0.0065
    """Seconds of a step that nothing explains: data, logging, synchronisation."""
    fixed_nodes: float = 0.0104
    """The same for every doubling of the nodes."""
    straggle: float = 0.0049
    """Loss for every doubling of the nodes: the slowest of many is waited for."""
    spread: float = 0.10
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
