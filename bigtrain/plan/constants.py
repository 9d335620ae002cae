"""What the planner's models take from measurements: few numbers, each with a physical meaning.

Fitted by `python benchmarks/plan.py --fit` to published measurements; `benchmarks/results/plan.json` holds the errors
on rows that were left out of the fit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Shares are of what the data sheet says, between 0 and 1."""

    matmul: float = 0.75
    """Share of the peak that a large matrix product reaches."""
    matmul_half: float = 6e9
    """FLOPs of a product that reaches half of that: smaller ones do not fill the card."""
    narrow: float = 1024.0
    """Shortest side of a product at which it loses half: slices of tensor ranks are thin."""
    attention: float = 0.5
    """Share of the peak of fused attention, against the square without the mask."""
    unfused: float = 0.35
    """Share of the memory bandwidth that attention with all its scores in memory reaches."""
    bandwidth: float = 0.8
    """Share of the memory bandwidth of element-wise kernels."""
    passes: float = 24.0
    """Times that the residual width of a token is read or written in a layer's forward pass, outside of products."""
    launches: float = 300e-6
    """Seconds of the CPU to launch the kernels of a layer's forward pass."""
    link: float = 0.7
    """Share of the bandwidth inside a node that collectives reach."""
    network: float = 0.7
    """Share of the bandwidth between nodes that collectives reach."""
    link_latency: float = 12e-6
    """Seconds of a collective inside a node, however small."""
    hop: float = 0.5
    """Share of the messages between pipeline stages that is waited for while the pipeline is full."""
    overlap: float = 0.7
    """Share of the communication of gradients and weights that is hidden behind compute, where there is enough."""
    optimizer_passes: float = 1.3
    """Memory traffic of an update over its least (28 bytes a parameter with AdamW)."""
    fixed: float = 0.01
    """Seconds of a step that nothing explains: data, logging, synchronisation."""
    straggle: float = 0.012
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
