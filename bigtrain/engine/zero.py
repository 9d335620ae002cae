"""ZeRO 1, 2 and 3 by DeepSpeed: weights, gradients and optimizer state cut into flat partitions.

The only file that imports deepspeed, and only when an engine is built. Everything that is not sharding stays
ours: batch arithmetic, loss scaling, learning rates, checkpoints (design D3).
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from bigtrain.config import Config
from bigtrain.engine.partition import partition_as_built
from bigtrain.engine.protocol import Refuse, StepResult
from bigtrain.engine.scaler import LossScaler
from bigtrain.logical import Logical, Piece, boxes_of_flat_range, logical_of
from bigtrain.mesh import Axis, Mesh
from bigtrain.model.batch import Batch
from bigtrain.model.transformer import Block
from bigtrain.optim import build_optimizer, materialise_state, moments_of, set_step
from bigtrain.parallel.partial import SumAtLast, sum_parts
from bigtrain.parallel.pipeline import Pipeline

PERSISTENT_ELEMENTS = 10_000
"""ZeRO-3 keeps smaller parameters (norms, biases) whole on every rank: gathering costs more than it saves."""

BUCKET_ELEMENTS = 100_000_000
"""Gradients are reduced in buckets of this size: a buffer of 400 MB in fp32 (DeepSpeed's default: 2 GB)."""

LIVE_ELEMENTS, PREFETCH_ELEMENTS = 1_000_000_000, 50_000_000
"""ZeRO-3 holds and reads ahead at most so many gathered elements (DeepSpeed's defaults)."""


class ZeroEngine:
    """DeepSpeed's engine behind the `Engine` protocol."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        """`model` is fp32, laid over the mesh, the same on all ranks of the replica axis; it becomes the engine's.

        With ZeRO-3 it is on the meta device: it is filled with its initial values and cut parameter by
        parameter, and no rank ever holds all of it.
        """
        self._linear = F.linear
        self.pipeline = model if isinstance(model, Pipeline) else None
        deepspeed = import_deepspeed(mesh)
        self._groups = deepspeed.utils.groups
        block = max((elements_of(m) for m in model.modules() if isinstance(m, Block)), default=0)
        told = deepspeed_config(config, elements_of(model), block, pipeline=self.pipeline is not None)
        if next(model.parameters()).is_meta:
            with quiet():
                partition_as_built(deepspeed, told, model, config, mesh)
        self.mesh = mesh
        self.level = sharding_level(config, self.pipeline is not None)
        self.updates = 0
        self.scaler = LossScaler() if config.train.precision == "fp16" else None
        self.records: list[tuple[Logical, Any]] = [
            (logical_of(p), p) for p in model.parameters() if p.requires_grad
        ]
        for record, p in self.records:
            p.model_parallel = record.counted  # its mark of a parameter that this rank counts in the norm
        self.base = build_optimizer(((record.name, p) for record, p in self.records), config.optim)
        if self.level == 3 and block:
            # The weights of a block come in one message instead of seven, and its hooks run once: with 4 layers of
            # width 256 on two CPU ranks 8 % of the step (benchmarks/parallel.py).
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        with quiet():
            self.engine, self.sharder, _, _ = deepspeed.initialize(
                model=model,
                optimizer=self.base,
                config=told,
                dist_init_required=False,
                mpu=Topology(mesh) if mesh.model.size > 1 else None,
            )
        for flat, group in self._flats():
            materialise_state(self.base, flat, group)
        self._parts: SumAtLast | None = None
        if self.pipeline is None:
            self._parts = SumAtLast((p for _, p in self.records), mesh)
        elif config.train.precision != "fp32" and not self._is_bf16_optimizer:
            for _, p in self.records:
                # What its own hook does outside coalesce_grad_reduction: add up in fp32.
                p.register_post_accumulate_grad_hook(self.sharder._fill_param_grad_accum_attribute)

    def train_step(
        self, microbatches: Sequence[Batch], counted: int, lr: float, refuse: Refuse | None = None
    ) -> StepResult:
        """See `Engine.train_step`."""
        scale = self.scaler.scale if self.scaler else 1.0
        if self.scaler:
            self.sharder.loss_scaler.cur_scale = scale
        factor = self.mesh.replica.size / max(counted, 1)  # DeepSpeed averages over the replicas
        mine = (
            self._one_by_one(microbatches, factor)
            if self.pipeline is None
            else self._piped(microbatches, factor * scale)
        )
        for group in self.base.param_groups:
            group["lr"] = lr
        (nll,) = self.mesh.sum([mine if self.mesh.tensor.rank == 0 else 0.0])
        loss = nll / max(counted, 1)
        refused = self._update(lambda scaled: refuse is not None and refuse(loss, scaled / scale))
        overflow = self.sharder.overflow and refused is None
        self.updates += not self.sharder.overflow
        if self.scaler:
            self.scaler.update(overflow=overflow)
        norm = float(self.sharder._global_grad_norm) if refused is None else refused / scale
        return StepResult(loss, norm, bool(self.sharder.overflow), scale)

    def _update(self, refuse: Callable[[float], bool]) -> float | None:
        """DeepSpeed's step, unless the norm of the gradients (times the loss scale) is refused; then that norm.

        It knows its norm only inside its step, where it asks whether that is finite before it changes anything. A
        refused one is answered as if it were not, so that it clears up as after an overflow.
        """
        module: Any = sys.modules[type(self.sharder).__module__]
        finite, asked, refused = module.is_invalid_grad_norm, False, None

        def invalid(norm: Any) -> bool:
            nonlocal asked, refused
            if finite(norm):
                return True
            if not asked:  # it asks about norms of partitions too, later on
                asked, scaled = True, float(norm)
                refused = scaled if refuse(scaled) else None
            return refused is not None

        module.is_invalid_grad_norm = invalid
        try:
            self.engine.step()
        finally:
            module.is_invalid_grad_norm = finite
        return refused

    def _one_by_one(self, microbatches: Sequence[Batch], factor: float) -> float:
        """Forward and backward, microbatch after microbatch; gradients are reduced on the way."""
        assert self._parts is not None
        losses = []
        for i, batch in enumerate(microbatches):
            self._parts.last = i == len(microbatches) - 1
            self.engine.set_gradient_accumulation_boundary(self._parts.last)
            out = self._forward(batch)
            losses.append(out.nll)
            # A nll that is not finite makes the gradient NaN (0 * inf).
            self.engine.backward(out.objective * (factor + 0.0 * out.nll))
        return float(torch.stack(losses).double().sum())

    def _piped(self, microbatches: Sequence[Batch], factor: float) -> float:
        """The whole schedule leaves its gradients on the parameters; they are reduced once, at its end."""
        assert self.pipeline is not None
        for _, p in self.records:
            p.grad_accum = None  # its forward pass would clear the last step's
        if (
            self._is_bf16_optimizer
        ):  # no coalescing there, nor any need: it adds up in fp32 and reduces when told
            nll = self.pipeline.train_step(microbatches, factor)
            sum_parts(((r, p._hp_grad) for r, p in self.records), self.mesh)
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
            return float(nll)
        with self.engine.coalesce_grad_reduction():
            nll = self.pipeline.train_step(microbatches, factor)
            sum_parts(((r, self.sharder.get_gradient_for_reduction(p)) for r, p in self.records), self.mesh)
        return float(nll)

    @property
    def _is_bf16_optimizer(self) -> bool:
        """DeepSpeed's class for ZeRO-1 over bf16 weights with fp32 gradients; it shares little with the others."""
        return hasattr(self.sharder, "fp32_groups_gradients")

    def _forward(self, batch: Batch) -> Any:
        batch = batch.to(self.mesh.device)
        return self.engine(
            batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets, sample_ids=batch.sample_ids
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """See `Engine.evaluate`. Collective: ZeRO-3 gathers weights, so all ranks must call it equally often."""
        self.engine.eval()
        if self.pipeline is not None:
            nll = float(self.pipeline.evaluate(batches))
        else:
            nll = math.fsum(float(self._forward(batch).nll) for batch in batches)
        self.engine.train()
        return nll if self.mesh.tensor.rank == 0 else 0.0

    def pieces(self, owned: bool) -> Iterator[Piece]:
        """See `Engine.pieces`: partitions do not overlap, so replicas own all they hold."""
        for fragment in self._fragments():
            record = fragment.logical
            if owned and not record.counted:
                continue
            state = self.base.state[fragment.flat]
            views = {"master": fragment.flat.detach(), **{m: state[m] for m in moments_of(fragment.group)}}
            boxes = boxes_of_flat_range(record.sizes, fragment.start, fragment.count)
            for kind, flat in views.items():
                for box in boxes:
                    first = fragment.offset + box.start - fragment.start
                    view = flat.narrow(0, first, torch.Size(box.sizes).numel()).view(box.sizes)
                    offset = tuple(a + b for a, b in zip(record.offset, box.offset, strict=True))
                    yield Piece(kind, record.name, record.shape, offset, view)

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
        self._groups.mpu = None  # it keeps the last engine's mesh for the next one
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
                start = self.mesh.replica.rank * size
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
    """Elements [start, start + count) of a parameter's box lie in `flat` from `offset` on."""

    logical: Logical
    start: int
    count: int
    flat: torch.Tensor
    group: dict[str, Any]
    offset: int


class Topology:
    """What DeepSpeed asks about the mesh (its `mpu`): who shares a replica's gradients, whose norms add up."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_data_parallel_group(self) -> Any:
        """Ranks that hold the same weights."""
        return self._group(self.mesh.replica)

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self.mesh.replica.size

    def get_data_parallel_rank(self) -> int:
        """This rank's place among them."""
        return self.mesh.replica.rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return list(self.mesh.replica.ranks)

    def get_model_parallel_group(self) -> Any:
        """Ranks whose weights make one model."""
        return self._group(self.mesh.model)

    def get_model_parallel_world_size(self) -> int:
        """Their number."""
        return self.mesh.model.size

    def get_model_parallel_rank(self) -> int:
        """This rank's place among them. Rank 0 counts all it holds, the others what is marked."""
        return self.mesh.model.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        """The first of them."""
        return self.mesh.model.ranks[0]

    def _group(self, axis: Axis) -> Any:
        return axis.group or self.mesh.axes["alone"].group


def sharding_level(config: Config, pipeline: bool) -> int:
    """The ZeRO level that DeepSpeed is told.

    Gradients of a pipeline stay whole until its last microbatch, so that level 2 saves nothing over level 1, which
    adds up in fp32 where level 2 would round the sum of 16-bit gradients.
    """
    return min(config.layout.zero, 1) if pipeline else config.layout.zero


def elements_of(module: nn.Module) -> int:
    """Of all parameters."""
    return sum(p.numel() for p in module.parameters())


def deepspeed_config(config: Config, elements: int, block: int, *, pipeline: bool) -> dict[str, Any]:
    """What DeepSpeed is told: sharding and precision of a model of so many `elements`, of which a layer has `block`.

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
            "stage": sharding_level(config, pipeline),
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
            # An eighth of a small model: one bucket for all would be a second set of gradients, and overlap nothing.
            "reduce_bucket_size": min(BUCKET_ELEMENTS, max(elements // 8, 1)),
            # Its defaults keep up to 1e9 gathered elements, all of a smaller model: ZeRO-3 would save nothing over
            # ZeRO-2. Gathered again in backward, a quarter of the model at a time, the next ones meanwhile; and one
            # layer while another is computed at least (two of 4 layers: 2 % of the step, benchmarks/parallel.py).
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": min(LIVE_ELEMENTS, max(elements // 4, 2 * block)),
            "stage3_prefetch_bucket_size": min(PREFETCH_ELEMENTS, max(elements // 8, block)),
            # Its default sums every bucket on all ranks, twice the bytes of sending each part to its owner.
            "use_multi_rank_bucket_allreduce": False,
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
        # immediate_grad_update: add up by hooks, which fire in a pipeline's backward passes too.
        told["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": pipeline}
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
