"""What bigtrain's layouts are compared with: the same plain model laid over two ranks by torch's own APIs, by hand.

DistributedDataParallel (with ZeroRedundancyOptimizer for ZeRO 1), fully_shard for ZeRO 2 and 3,
torch.distributed.tensor.parallel with loss_parallel, torch.distributed.pipelining's schedules; for context an
all-gather of keys and values or an all-to-all of heads, since torch's experimental context_parallel has no rule for
the CPU's attention (2.13). Every side clips, updates by fused AdamW and sums the loss over the ranks. A layout
without a peer is an error, as are other losses or gradient norms than bigtrain's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import parallel_worker as worker
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from bigtrain.config import Config
from bigtrain.engine import make_engine
from bigtrain.mesh import Mesh
from bigtrain.model.attention import Scope, make_scope
from bigtrain.model.batch import Batch
from bigtrain.model.build import build_model
from bigtrain.optim import parameter_groups
from bigtrain.parallel.context import columns_of
from bigtrain.parallel.schedule import chunks_of_rank
from bigtrain.parallel.split import layers_of_chunks

Step = Callable[[Sequence[Batch], int], tuple[float, float]]
"""Loss and gradient norm of one optimizer step from a rank's microbatches and the tokens of all ranks."""
LR = 1e-3
LINEAR = F.linear
"""torch's own: DeepSpeed's ZeRO-3 puts another in its place for the whole process."""
SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def throughput(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Rounds of both sides in turn, on the same batches; seconds a step of each, after the same first steps."""
    config = worker.config_of(case)
    assert LINEAR is F.linear, "a ZeRO-3 engine is still open"
    engine = make_engine(worker.meta_model(config), config, mesh)
    replaced, F.linear = F.linear, LINEAR
    bare = peer(config, mesh)

    def ours(batches: Sequence[Batch], counted: int) -> tuple[float, float]:
        F.linear = replaced
        done = engine.train_step(batches, counted, LR)
        return done.loss, done.grad_norm

    def theirs(batches: Sequence[Batch], counted: int) -> tuple[float, float]:
        F.linear = LINEAR
        return bare(batches, counted)

    sides = {"ours": ours, "theirs": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    data = [worker.batches(case, mesh, step) for step in range(2)]
    first = {name: [side(*d) for d in data] for name, side in sides.items()}
    for mine, other in zip(first["ours"], first["theirs"], strict=True):
        for a, b in zip(mine, other, strict=True):
            assert abs(a - b) < 2e-4 * abs(a), f"{case['name']}: not the same work: losses, norms {first}"
    for number in range(case["rounds"]):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            mesh.barrier()
            began = time.perf_counter()
            for step in range(case["steps"]):
                sides[name](*data[step % 2])
            mesh.barrier()
            seconds[name].append((time.perf_counter() - began) / case["steps"])
    engine.close()
    tokens = case["batch"] * case["sequence"] * case["microbatches"] * mesh.data_size
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "ratio": round(median(seconds["theirs"]) / median(seconds["ours"]), 4),
        "ratios": [round(r, 4) for r in ratios],
        "tokens_per_second": {name: round(tokens / median(s)) for name, s in seconds.items()},
        "losses": {name: [loss for loss, _ in steps] for name, steps in first.items()},
        "grad_norms": {name: [norm for _, norm in steps] for name, steps in first.items()},
    }


def peer(config: Config, mesh: Mesh) -> Step:
    """The step of the bare torch side for a layout along one axis."""
    axes = {name for name in ("tensor", "pipeline", "context", "data") if mesh.axes[name].size > 1}
    zero = config.layout.zero
    match sorted(axes):
        case ["tensor"] if zero == 0:
            return tensor_peer(config)
        case ["pipeline"] if zero == 0:
            return pipeline_peer(config, mesh)
        case ["context"] if zero == 0:
            return data_peer(config, mesh, sharded=False)
        case ["data"] if zero < 2:
            return data_peer(config, mesh, sharded=zero == 1)
        case ["data"]:
            return fsdp_peer(config, mesh, whole=zero == 2)
    raise NotImplementedError(f"no bare torch peer for axes {sorted(axes)} with ZeRO {zero}")


def plain(config: Config) -> Any:
    """The whole model with its initial values."""
    return build_model(config.model, config.loss, device=torch.device("cpu"), seed=config.train.seed)


def adamw(config: Config, named: Any, kind: Any = torch.optim.AdamW, **more: Any) -> Any:
    """Fused AdamW with bigtrain's groups."""
    groups = [
        {key: value for key, value in group.items() if key != "rule"}
        for group in parameter_groups(named, config.optim)
    ]
    betas = (config.optim.beta1, config.optim.beta2)
    return kind(groups, lr=LR, betas=betas, eps=config.optim.eps, fused=True, **more)


def summed(loss: torch.Tensor) -> float:
    """A loss summed over all ranks."""
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total)


def data_peer(config: Config, mesh: Mesh, *, sharded: bool) -> Step:
    """DistributedDataParallel; with shared sequences too, where each rank sees its columns."""
    model = plain(config)
    context = mesh.context if mesh.context.size > 1 else None
    by = config.layout.context_by
    if context is not None:
        attend: Any = {"gather": ZigzagAttention, "ulysses": HeadsAttention}[by]
        for layer in model.layers:
            layer.self_attn.attend = attend(context.rank, context.size)
    if sharded:
        optimizer = adamw(
            config, model.named_parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW
        )
    else:
        optimizer = adamw(config, model.named_parameters())
    ddp = DistributedDataParallel(model)

    def step(batches: Sequence[Batch], counted: int) -> tuple[float, float]:
        total = torch.zeros(())
        for i, batch in enumerate(batches):
            with nullcontext() if i == len(batches) - 1 else ddp.no_sync():
                tokens, targets, scope = batch.tokens, batch.targets, None
                if context is not None:
                    columns = columns_of(context.rank, context.size, tokens.shape[1], by=by)
                    scope = make_scope(config.model, tokens, queries=columns)
                    tokens, targets = tokens[:, columns], targets[:, columns]
                out = ddp(tokens, targets=targets, scope=scope)
                (out.objective * (mesh.world / counted)).backward()
                total += out.nll
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return summed(total) / counted, float(norm)

    return step


class ZigzagAttention:
    """All-gather of keys and values, then each half of the queries against what it may see."""

    def __init__(self, rank: int, n: int) -> None:
        self.rank, self.n = rank, n

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Scope) -> torch.Tensor:
        """q (B, Q, H, D), k and v (B, Q, K, D)."""
        half = q.shape[1] // 2
        whole = all_gather_tensor_autograd(torch.stack([k, v]), 0, dist.group.WORLD)
        whole = whole.unflatten(0, (self.n, 2)).unflatten(3, (2, half))  # n, kv, B, 2, half, K, D
        early, late = whole.unbind(3)
        ordered = torch.cat([early, late.flip(0)]).permute(1, 2, 0, 3, 4, 5).flatten(2, 3)  # kv, B, S, K, D
        repeat = q.shape[2] // k.shape[2]
        k, v = ordered.repeat_interleave(repeat, dim=3).transpose(2, 3).unbind()
        outs = []
        for part, number in zip(
            q.transpose(1, 2).chunk(2, 2), (self.rank, 2 * self.n - 1 - self.rank), strict=True
        ):
            seen = (number + 1) * half
            mask = torch.ones(half, seen, dtype=torch.bool).tril(seen - half)
            outs.append(F.scaled_dot_product_attention(part, k[:, :, :seen], v[:, :, :seen], attn_mask=mask))
        return torch.cat(outs, 2).transpose(1, 2)


class HeadsAttention:
    """All tokens of a share of the heads: one all-to-all before attention and one after it."""

    def __init__(self, rank: int, n: int) -> None:
        self.n = n

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Scope) -> torch.Tensor:
        """q (B, Q, H, D), k and v (B, Q, K, D)."""
        shares = [x.shape[2] // self.n for x in (q, k, v)]
        # Row r of n: the heads of rank r. After the exchange: the tokens of rank r.
        packed = torch.cat([x.unflatten(2, (self.n, -1)) for x in (q, k, v)], 3).movedim(2, 0)
        heads = self.swapped(packed).permute(1, 3, 0, 2, 4).flatten(2, 3)  # B, heads, S, D
        q, k, v = heads.split(shares, 1)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        tokens = self.swapped(out.unflatten(2, (self.n, -1)).movedim(2, 0))  # n, B, H / n, Q, D
        return tokens.permute(1, 3, 0, 2, 4).flatten(2, 3)

    def swapped(self, rows: torch.Tensor) -> torch.Tensor:
        """Row i to rank i."""
        return all_to_all_single_autograd(rows.contiguous(), None, None, dist.group.WORLD)


def fsdp_peer(config: Config, mesh: Mesh, *, whole: bool) -> Step:
    """FSDP2, every layer and the rest, gradients reduced in every microbatch.

    `whole`: weights are gathered once a step and stay until its last backward pass, as with ZeRO 2; else they are
    gathered for each forward and each backward pass, as with ZeRO 3.
    """
    model, ranks = plain(config), init_device_mesh("cpu", (mesh.world,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=ranks, reshard_after_forward=not whole)
        # gloo has no average: sums, not divided at all.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
    optimizer = adamw(config, model.named_parameters())

    def step(batches: Sequence[Batch], counted: int) -> tuple[float, float]:
        total = torch.zeros(())
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            model.set_is_last_backward(last)
            model.set_reshard_after_backward(last or not whole)
            out = model(batch.tokens, targets=batch.targets)
            (out.objective / counted).backward()
            total += out.nll
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        assert isinstance(norm, DTensor)
        optimizer.step()
        optimizer.zero_grad()
        return summed(total) / counted, float(norm.full_tensor())

    return step


def tensor_peer(config: Config) -> Step:
    """parallelize_module as torchtitan does it, with loss_parallel."""
    model, mesh = plain(config), init_device_mesh("cpu", (2,))
    sequence = config.layout.sequence
    outside = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "lm_head": ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        plan["norm"] = SequenceParallel()
    parallelize_module(model, mesh, plan)
    for layer in model.layers:
        plan = {f"self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")} | {
            "self_attn.o_proj": RowwiseParallel(output_layouts=outside),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=outside),
        }
        if sequence:
            layer.post_attention_layernorm = Apart(layer.post_attention_layernorm)
            plan |= {
                "input_layernorm": SequenceParallel(),
                "post_attention_layernorm.norm": SequenceParallel(),
            }
            plan["self_attn"] = PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
            )
            plan["mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        parallelize_module(layer, mesh, plan)
    optimizer = adamw(config, ((n, p) for n, p in model.named_parameters()))
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]

    def step(batches: Sequence[Batch], counted: int) -> tuple[float, float]:
        total = torch.zeros(())
        for batch in batches:
            # Made outside, as the sequence that the model sees is a share of the whole.
            scope = make_scope(config.model, batch.tokens)
            with loss_parallel():
                logits = model(batch.tokens, scope=scope)
                loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
                (loss / counted).backward()
            total += loss.full_tensor().detach() if isinstance(loss, DTensor) else loss.detach()
        norms = [nn.utils.get_total_norm([p.grad for p in group]) for group in (cut, whole) if group]
        norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
        for group in (cut, whole):
            if group:
                nn.utils.clip_grads_with_norm_(group, config.optim.clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(total) / counted, float(norm)

    return step


class Apart(nn.Module):
    """A norm that adds the residual before it, outside of what torch makes of the norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        x = residual + x
        return self.norm(x), x


class Stage(nn.Module):
    """One chunk of the model."""

    def __init__(self, model: Any, layers: range, *, first: bool, last: bool) -> None:
        super().__init__()
        self.config = model.config
        self.embed_tokens = model.embed_tokens if first else None
        self.layers = nn.ModuleList(model.layers[i] for i in layers)
        self.norm = model.norm if last else None
        self.lm_head = model.lm_head if last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, S) or hidden states (B, S, C) -> hidden states."""
        scope = make_scope(self.config, x if x.dim() == 2 else x[..., 0])
        x = x if self.embed_tokens is None else self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x, scope)
        return x if self.norm is None else self.norm(x)


def pipeline_peer(config: Config, mesh: Mesh) -> Step:
    """PipelineStages with static shapes and torch's schedule, on bigtrain's own split of the layers."""
    layout, layers = config.layout, layers_of_chunks(config)
    end = len(layers) - 1
    held = chunks_of_rank(layout.schedule, mesh.pipeline.size, layout.chunks)[mesh.pipeline.rank]
    model = plain(config)
    stages = nn.ModuleDict({str(c): Stage(model, layers[c], first=c == 0, last=c == end) for c in held})
    optimizer = adamw(config, stages.named_parameters())
    B, S = config.train.microbatch, config.data.sequence_length
    made: dict[int, Any] = {}
    state: dict[str, Any] = {}

    def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        out = stages[str(end)].lm_head(hidden, targets)  # type: ignore[operator, union-attr]
        state["nll"] = state["nll"] + out.nll
        return out.objective / state["counted"]  # type: ignore[no-any-return]

    def schedule(m: int) -> Any:
        if m not in made:
            hidden = torch.zeros(B, S, config.model.width, requires_grad=True)
            tokens = torch.zeros(B, S, dtype=torch.long)
            pipes = [
                PipelineStage(
                    stages[str(c)],
                    c,
                    len(layers),
                    torch.device("cpu"),
                    input_args=hidden if c else tokens,
                    output_args=hidden,
                )
                for c in held
            ]
            kind = SCHEDULES[layout.schedule]
            single = layout.schedule in ("gpipe", "1f1b")
            made[m] = kind(pipes[0] if single else pipes, m, loss_fn=loss_of, scale_grads=False)
        return made[m]

    def step(batches: Sequence[Batch], counted: int) -> tuple[float, float]:
        state["nll"], state["counted"] = torch.zeros(()), counted
        tokens = [torch.cat([b.tokens for b in batches])] if 0 in held else []
        targets = torch.cat([b.targets for b in batches]) if end in held else None
        schedule(len(batches)).step(*tokens, target=targets, return_outputs=False)
        square = nn.utils.get_total_norm([p.grad for p in stages.parameters()]).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(stages.parameters(), config.optim.clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        return summed(state["nll"]) / counted, float(norm)

    return step
