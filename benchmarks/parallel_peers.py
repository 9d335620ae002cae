"""What bigtrain's layouts are compared with: the same plain model laid over two ranks by torch's own APIs, by hand.

DistributedDataParallel (and ZeroRedundancyOptimizer), torch.distributed.tensor.parallel with loss_parallel,
torch.distributed.pipelining's Schedule1F1B; for context an all-gather of keys and values, since torch's
experimental context_parallel has no rule for the CPU's attention (2.13). Every side clips, updates by fused AdamW and
sums the loss over the ranks.
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
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
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
from bigtrain.parallel.split import layers_of_chunks

Step = Callable[[Sequence[Batch], int], float]
LR = 1e-3


def throughput(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Rounds of both sides in turn, on the same batches; seconds a step of each, after the same first losses."""
    config = worker.config_of(case)
    engine = make_engine(worker.meta_model(config), config, mesh)
    theirs = peer(config, mesh)

    def ours(batches: Sequence[Batch], counted: int) -> float:
        return engine.train_step(batches, counted, LR).loss

    sides = {"ours": ours, "theirs": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    data = [worker.batches(case, mesh, step) for step in range(2)]
    first = {name: [side(*d) for d in data] for name, side in sides.items()}
    for a, b in zip(first["ours"], first["theirs"], strict=True):
        assert abs(a - b) < 2e-4 * abs(a), f"{case['name']}: not the same work: losses {first}"
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
        "losses": first,
    }


def peer(config: Config, mesh: Mesh) -> Step:
    """The step of the bare torch side for a layout."""
    layout = config.layout
    if mesh.tensor.size > 1:
        return tensor_peer(config)
    if mesh.pipeline.size > 1:
        return pipeline_peer(config, mesh)
    return data_peer(config, mesh, sharded=layout.zero > 0)


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
    if context is not None:
        for layer in model.layers:
            layer.self_attn.attend = ZigzagAttention(context.rank, context.size)
    if sharded:
        optimizer = adamw(
            config, model.named_parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW
        )
    else:
        optimizer = adamw(config, model.named_parameters())
    ddp = DistributedDataParallel(model)

    def step(batches: Sequence[Batch], counted: int) -> float:
        total = torch.zeros(())
        for i, batch in enumerate(batches):
            with nullcontext() if i == len(batches) - 1 else ddp.no_sync():
                tokens, targets, scope = batch.tokens, batch.targets, None
                if context is not None:
                    columns = zigzag(context.rank, context.size, tokens.shape[1])
                    scope = make_scope(config.model, tokens, queries=columns)
                    tokens, targets = tokens[:, columns], targets[:, columns]
                out = ddp(tokens, targets=targets, scope=scope)
                (out.objective * (mesh.world / counted)).backward()
                total += out.nll
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        return summed(total) / counted

    return step


def zigzag(rank: int, n: int, S: int) -> torch.Tensor:
    """Pieces `rank` and 2 n - 1 - rank of 2 n."""
    pieces = torch.arange(S).chunk(2 * n)
    return torch.cat([pieces[rank], pieces[2 * n - 1 - rank]])


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
            plan |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
            plan["self_attn"] = PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
            )
            plan["mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
        parallelize_module(layer, mesh, plan)
    optimizer = adamw(config, ((n, p) for n, p in model.named_parameters()))
    cut = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, DTensor)]

    def step(batches: Sequence[Batch], counted: int) -> float:
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
        return float(total) / counted

    return step


class Stage(nn.Module):
    """Half of the model."""

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
    """PipelineStage and Schedule1F1B with static shapes, on bigtrain's own split of the layers."""
    rank, layers = mesh.pipeline.rank, layers_of_chunks(config)
    stage = Stage(plain(config), layers[rank], first=rank == 0, last=rank == 1)
    optimizer = adamw(config, stage.named_parameters())
    B, S = config.train.microbatch, config.data.sequence_length
    made: dict[int, Any] = {}
    state: dict[str, Any] = {}

    def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        out = stage.lm_head(hidden, targets)  # type: ignore[misc]
        state["nll"] = state["nll"] + out.nll
        return out.objective / state["counted"]  # type: ignore[no-any-return]

    def schedule(m: int) -> Any:
        if m not in made:
            hidden = torch.zeros(B, S, config.model.width, requires_grad=True)
            tokens = torch.zeros(B, S, dtype=torch.long)
            pipe = PipelineStage(
                stage, rank, 2, torch.device("cpu"), input_args=hidden if rank else tokens, output_args=hidden
            )
            made[m] = Schedule1F1B(pipe, m, loss_fn=loss_of, scale_grads=False)
        return made[m]

    def step(batches: Sequence[Batch], counted: int) -> float:
        state["nll"], state["counted"] = torch.zeros(()), counted
        pipe = schedule(len(batches))
        if rank == 0:
            pipe.step(torch.cat([b.tokens for b in batches]))
        else:
            pipe.step(target=torch.cat([b.targets for b in batches]))
        square = nn.utils.get_total_norm([p.grad for p in stage.parameters()]).square()
        dist.all_reduce(square)
        nn.utils.clip_grads_with_norm_(stage.parameters(), config.optim.clip, square.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return summed(state["nll"]) / counted

    return step
