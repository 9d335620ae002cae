"""ZeRO 1, 2 and 3 by DeepSpeed: weights, gradients and optimizer state cut into flat partitions.

The only file that imports deepspeed, and only when an engine is built. Everything that is not sharding stays
ours: batch arithmetic, loss scaling, learning rates, checkpoints (design D3).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bigtrain.config import Config
from bigtrain.engine.partition import partition_as_built
from bigtrain.engine.protocol import StepResult
from bigtrain.engine.scaler import LossScaler
from bigtrain.logical import Logical, Piece, boxes_of_flat_range, logical_of
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.optim import build_optimizer, materialise_state, moments_of, set_step

PERSISTENT_ELEMENTS = 10_000
"""ZeRO-3 keeps smaller parameters (norms, biases) whole on every rank: gathering costs more than it saves."""

BUCKET_ELEMENTS = 100_000_000
"""Gradients are reduced in buckets of this size: a buffer of 400 MB in fp32 (DeepSpeed's default: 2 GB)."""


class ZeroEngine:
    """DeepSpeed's engine behind the `Engine` protocol."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        """`model` is fp32, the same on all ranks, and becomes the engine's.

        With ZeRO-3 it may be on the meta device: it is then filled with its initial values and cut parameter
        by parameter, and no rank ever holds it whole.
        """
        self._linear = F.linear
        deepspeed = import_deepspeed(mesh)
        told = deepspeed_config(config, sum(p.numel() for p in model.parameters()))
        if next(model.parameters()).is_meta:
            with quiet():
                partition_as_built(deepspeed, told, model, config, mesh.device)
        self.mesh = mesh
        self.level = config.layout.zero
        self.updates = 0
        self.scaler = LossScaler() if config.train.precision == "fp16" else None
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.records: list[tuple[Logical, Any]] = [(logical_of(p), p) for _, p in named]
        self.base = build_optimizer(named, config.optim)
        with quiet():
            self.engine, self.sharder, _, _ = deepspeed.initialize(
                model=model, optimizer=self.base, config=told, dist_init_required=False
            )
        for flat, group in self._flats():
            materialise_state(self.base, flat, group)

    def train_step(self, microbatches: Sequence[Batch], counted: int, lr: float) -> StepResult:
        """See `Engine.train_step`."""
        scale = self.scaler.scale if self.scaler else 1.0
        if self.scaler:
            self.sharder.loss_scaler.cur_scale = scale
        counted = max(counted, 1)
        losses = []
        for i, batch in enumerate(microbatches):
            self.engine.set_gradient_accumulation_boundary(i == len(microbatches) - 1)
            out = self._forward(batch)
            losses.append(out.nll)
            # DeepSpeed averages over the ranks; a nll that is not finite makes the gradient NaN (0 * inf).
            self.engine.backward(out.objective * (self.mesh.data_size / counted + 0.0 * out.nll))
        for group in self.base.param_groups:
            group["lr"] = lr
        self.engine.step()
        skipped = bool(self.sharder.overflow)
        self.updates += not skipped
        if self.scaler:
            self.scaler.update(overflow=skipped)
        (nll,) = self.mesh.sum([float(torch.stack(losses).double().sum())])
        return StepResult(nll / counted, float(self.sharder._global_grad_norm), skipped, scale)

    def _forward(self, batch: Batch) -> Any:
        batch = batch.to(self.mesh.device)
        return self.engine(
            batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets, sample_ids=batch.sample_ids
        )

    @torch.no_grad()
    def eval_step(self, batch: Batch) -> float:
        """See `Engine.eval_step`. ZeRO-3 gathers weights, so all ranks must call it equally often."""
        self.engine.eval()
        nll = float(self._forward(batch).nll)
        self.engine.train()
        return nll

    def pieces(self, owned: bool) -> Iterator[Piece]:
        """See `Engine.pieces`: partitions do not overlap, so this rank owns all it holds."""
        for fragment in self._fragments():
            state = self.base.state[fragment.flat]
            views = {"master": fragment.flat.detach(), **{m: state[m] for m in moments_of(fragment.group)}}
            boxes = boxes_of_flat_range(fragment.logical.shape, fragment.start, fragment.count)
            for kind, flat in views.items():
                for box in boxes:
                    first = fragment.offset + box.start - fragment.start
                    view = flat.narrow(0, first, torch.Size(box.sizes).numel()).view(box.sizes)
                    yield Piece(kind, fragment.logical.name, fragment.logical.shape, box.offset, view)

    def extra_state(self) -> dict[str, Any]:
        """See `Engine.extra_state`."""
        return {"updates": self.updates, "loss_scaler": self.scaler.state() if self.scaler else None}

    @torch.no_grad()
    def loaded(self, extra: dict[str, Any]) -> None:
        """See `Engine.loaded`."""
        self.updates = int(extra["updates"])
        set_step(self.base, self.updates)
        if self.scaler and extra.get("loss_scaler"):
            self.scaler = LossScaler(**extra["loss_scaler"])
        if self.level < 3:
            self.sharder.update_lp_params()
            return
        for i in range(len(self.sharder.fp32_partitioned_groups_flat)):
            self.sharder._reassign_or_swap_out_partitioned_parameters(i)
        whole = self.sharder.persistent_parameters
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def close(self) -> None:
        """Remove DeepSpeed's hooks and buffers, and the F.linear that ZeRO-3 put in place of torch's."""
        self.engine.destroy()
        F.linear = self._linear

    def _flats(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """This rank's flat fp32 partitions, with the optimizer group of each."""
        groups = self.base.param_groups
        if self.level == 3:
            for i, flat in enumerate(self.sharder.fp32_partitioned_groups_flat):
                yield flat, groups[self.sharder.sub_group_to_group_id[i]]
            return
        for group in groups:
            (flat,) = group["params"]
            yield flat, group

    def _fragments(self) -> Iterator[Fragment]:
        """Where in the flat partitions this rank's part of each parameter lies."""
        flats = list(self._flats())
        for logical, p in self.records:
            if self.level == 3:
                number, offset, size = self.sharder.grad_position[self.sharder.get_param_id(p)]
                start = self.mesh.data_rank * size
                count = max(0, min(size, p.ds_numel - start))
            elif p._hp_mapping is None:
                continue
            else:
                mapping = p._hp_mapping
                number = mapping.param_group_index
                offset = mapping.hp_fragment_address.start
                start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            flat, group = flats[number]
            yield Fragment(logical, start, count, flat, group, offset)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a logical tensor lie in `flat` from `offset` on."""

    logical: Logical
    start: int
    count: int
    flat: torch.Tensor
    group: dict[str, Any]
    offset: int


def deepspeed_config(config: Config, elements: int) -> dict[str, Any]:
    """What DeepSpeed is told: sharding and precision of a model of so many `elements`.

    As far as it knows, a step has one microbatch: train_step says which one is the last.
    """
    precision = config.train.precision
    told: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.clip,
        "steps_per_print": 1 << 60,
        "zero_allow_untested_optimizer": True,
        # Its CPU Adam is compiled at start (minutes, silent); torch's fused AdamW is as fast on a CPU.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.layout.zero,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            "reduce_bucket_size": min(BUCKET_ELEMENTS, elements),
        },
    }
    if config.layout.offload == "optimizer":
        told["zero_optimization"]["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": torch.cuda.is_available(),
        }
    if precision != "fp32":
        told["data_types"] = {"grad_accum_dtype": "fp32"}
        told["communication_data_type"] = "fp32"
    if precision == "bf16":
        told["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision == "fp16":
        # A static scale, which train_step sets from our own scaler before each step.
        told["fp16"] = {"enabled": True, "loss_scale": 1.0}
    return told


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without warnings, without what DeepSpeed prints beside its log, and without torch.compile.

    DeepSpeed decorates Muon functions, which are not used here, with torch.compile when it is imported and started;
    that alone imports torch's compiler, 1.2 s of start-up.
    """
    compiler = torch.compile
    torch.compile = _not_compiled  # type: ignore[assignment]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compiler


def _not_compiled(model: Any = None, **_: Any) -> Any:
    """torch.compile as a function or a decorator that leaves things as they are."""
    return model if model is not None else lambda function: function


def import_deepspeed(mesh: Mesh) -> Any:
    """Import DeepSpeed without its log, its warnings and its compilation, on this mesh's process group.

    It adopts a process group that exists; one process gets a group of its own, without any port.
    """
    if mesh.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Without it, it starts `numactl` in every microbatch to count devices (7 ms).
        os.environ.setdefault("LOCAL_SIZE", str(mesh.place.local_world))
    os.environ.setdefault("LOCAL_RANK", str(mesh.place.local_rank))
    with quiet():
        import deepspeed
        from deepspeed.runtime import bf16_optimizer

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Memory reports that it prints while it starts, each with a garbage collection (3 s together).
        bf16_optimizer.see_memory_usage = lambda *_, **__: None
        # On a CPU it would compile a shared-memory all-reduce first: 40-220 s, and a stale lock hangs it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if mesh.device.type == "cpu":
            # It refuses fp16 where the CPU has no instructions for it; torch computes it everywhere.
            deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        if not dist.is_initialized():
            backend = "nccl" if mesh.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(verbose=False)
    # It calls collectives by names that torch 2.13 deprecates, with a warning at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed
