"""What is planned: a model, a batch and a layout on a number of GPUs, as numbers only.

A config and a number of ranks make one, and so does a row of published measurements, which is how the planner's
constants are fitted and tested (`benchmarks/plan.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigtrain.budget import BatchSchedule
from bigtrain.config import Config, ModelConfig
from bigtrain.grid import grid_of


@dataclass(frozen=True)
class Job:
    """One training job. Ranks = pipeline x data x context x tensor."""

    model: ModelConfig
    sequence_length: int
    global_batch: int
    """Sequences in one optimizer step, over all ranks."""
    microbatch: int
    """Sequences that one data rank computes at a time."""
    tensor: int = 1
    sequence: bool = True
    """Norms and residuals shared between tensor ranks."""
    pipeline: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    """Pieces of the model on each pipeline rank."""
    split: tuple[int, ...] | None = None
    """Layers in each of the pipeline x chunks pieces; None: balanced by cost."""
    context: int = 1
    context_by: str = "gather"
    data: int = 1
    zero: int = 1
    optimizer: Literal["adamw", "sgd", "plain sgd", "muon"] = "adamw"
    """plain sgd: without momentum."""
    offload: bool = False
    """Optimizer state in host memory."""
    recompute: Literal["none", "selective", "full"] = "none"
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    attention: Literal["flash", "masked", "unfused"] = "flash"
    """masked: fused too, and documents are kept apart or a window is set, so that torch's must be told by a mask who
    sees whom; bigtrain's kernels need none: see `masked`."""
    kernels: bool = False
    """Attention, norms, rotary positions, SwiGLU and the loss run in bigtrain's Triton kernels, as far as these take
    the precision: see `fused_attention`."""
    compiled: bool = False
    overlap: bool = True
    """Gradients travel while the backward pass makes more."""
    tensor_overlap: bool = False
    """Messages between tensor ranks travel while products run."""
    gradient_bytes: int = 4
    """Of a gradient on its way; bigtrain adds up in fp32."""
    software: str = "bigtrain"
    """Whose code it is: "bigtrain", or another framework's whose published figures are compared with."""

    @property
    def fused_attention(self) -> bool:
        """Whether attention runs in bigtrain's kernels: a test holds this equal to what the model decides."""
        return self.kernels and self.precision != "fp32" and self.model.dim_per_head <= 256

    @property
    def masked(self) -> bool:
        """Whether attention has a mask. Our kernels get one too where keys are gathered, and leave it to torch's."""
        whole = self.fused_attention and not (self.context > 1 and self.context_by == "gather")
        return self.attention == "masked" and not whole

    @property
    def zero_bubble(self) -> bool:
        """Whether the schedule runs backward passes in halves."""
        return self.pipeline > 1 and self.schedule in ("zbv", "interleaved-zb")

    @property
    def ranks(self) -> int:
        """GPUs in use."""
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def microbatches(self) -> int:
        """Microbatches that one data rank computes in a step."""
        return self.global_batch // (self.microbatch * self.data)

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.global_batch * self.sequence_length


def at_longest(config: Config) -> Config:
    """The config with its longest sequences from the start: no other stage of [data.stages] needs as much memory."""
    lengths = config.data.lengths.values()
    if len(lengths) == 1:
        return config
    data = config.data.model_copy(update={"sequence_length": max(lengths), "stages": {}})
    return config.model_copy(update={"data": data})


def job_of(config: Config, ranks: int) -> Job:
    """The job that a config makes of so many ranks, of its longest sequences. Raises UserError as `grid_of` does."""
    grid = grid_of(config, ranks)
    config = at_longest(config)
    layout, optim = config.layout, config.optim
    return Job(
        model=config.model,
        sequence_length=config.data.sequence_length,
        global_batch=BatchSchedule.of(config).full,
        microbatch=config.train.microbatch,
        tensor=grid.tensor,
        sequence=layout.sequence,
        pipeline=grid.pipeline,
        schedule=layout.schedule,
        chunks=layout.chunks if grid.pipeline > 1 else 1,
        split=tuple(layout.split) if layout.split and grid.pipeline > 1 else None,
        context=grid.context,
        context_by=layout.context_by,
        data=grid.data,
        zero=layout.zero if ranks > 1 else 0,
        optimizer="plain sgd" if optim.kind == "sgd" and not optim.momentum else optim.kind,
        offload=layout.offload == "optimizer",
        recompute=layout.recompute,
        precision=config.train.precision,
        attention="masked" if config.data.document_mask or config.model.sliding_window else "flash",
        kernels=layout.kernels in ("auto", "triton") and config.model.kind == "transformer",
    )
