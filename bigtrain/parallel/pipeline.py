"""Pipeline parallelism: a model cut into chunks, and the executor that walks a schedule's actions.

The executor is ours because the library's keeps gradients of all microbatches in 16 bits, wants equal documents in
all microbatches, and splits backward passes by walking the autograd graph, which recomputation breaks
(docs/decisions/0006). Shapes: B batch, S sequence, C model width; hidden states are (B, S, C), or with sequence
parallelism (T/n, C).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bigtrain.logical import logical_of
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.model.transformer import Transformer
from bigtrain.parallel.region import Job, Later, run_jobs
from bigtrain.parallel.schedule import Action, Message, holders, messages, needed, orders, produced


def cut(model: Transformer, parts: Sequence[range], held: Sequence[int]) -> dict[int, Transformer]:
    """The chunks that this rank holds of a whole meta model, by number; chunk i has the layers parts[i].

    The first chunk has the embedding, the last one norm and head. Chunks share parameters where the model does:
    a tied embedding that a V-shaped schedule keeps on one rank stays one.
    """
    found = {}
    for number in held:
        chunk = copy.copy(model)
        chunk._modules = dict(model._modules)
        chunk.layers = nn.ModuleList(model.layers[i] for i in parts[number])
        if number > 0:
            chunk.embed_tokens = chunk.embed_positions = None
        if number < len(parts) - 1:
            chunk.norm = chunk.lm_head = None
        found[number] = chunk
    return found


def mark_tied(model: Transformer, mesh: Mesh) -> None:
    """Record that the tied embedding of a cut model lies on the first and the last pipeline rank.

    Each knows a part of its gradient; the first one counts and saves it.
    """
    if not model.config.tied or mesh.axes["ends"].size == 1:
        return
    for module in (model.embed_tokens, model.lm_head):
        if module is not None:
            weight: Any = module.weight
            first = mesh.pipeline.rank == 0
            weight.logical = replace(logical_of(weight), counted=first, summed="ends")


class Pipeline(nn.Module):
    """This rank's chunks and the way microbatches take through all of them."""

    def __init__(
        self, chunks: dict[int, nn.Module], mesh: Mesh, *, schedule: str, virtual: int, later: Later
    ) -> None:
        """`chunks` by number, each called as `Transformer.forward`; `virtual` of them on every rank.

        `later` is what the layers hand put-off weight gradients to.
        """
        super().__init__()
        self.chunks = nn.ModuleList(chunks.values())
        self.numbers = list(chunks)
        self.count = virtual * mesh.pipeline.size
        self.mesh = mesh
        self.later = later
        self.plan = cache(lambda m: orders(schedule, mesh.pipeline.size, virtual, m))

    def train_step(self, microbatches: Sequence[Batch], factor: float) -> torch.Tensor:
        """Add factor x the gradient of all microbatches to the parameters' .grad (collective on the pipeline).

        Returns the sum of plain cross-entropies, float64: 0 on ranks without the last chunk.
        """
        return _Run(self, self.plan(len(microbatches)), microbatches, factor).walk()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The forward passes only (collective on the pipeline); returns as `train_step`."""
        forward = [[a for a in order if a.kind == "F"] for order in self.plan(len(batches))]
        return _Run(self, forward, batches, 0.0).walk()


@dataclass
class _Run:
    """One walk through a schedule. Everything kept per (chunk, microbatch) is dropped as soon as it is used."""

    pipeline: Pipeline
    plan: Sequence[Sequence[Action]]
    batches: Sequence[Batch]
    factor: float
    entered: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """Hidden states that a chunk started from: the leaves whose gradient goes back."""
    left: dict[tuple[int, int], GradientEdge] = field(default_factory=dict)
    """Where backward starts. The edge, not the tensor: the values are with the next chunk already."""
    jobs: dict[tuple[int, int], list[Job]] = field(default_factory=dict)
    """Weight gradients that wait for their W."""

    def walk(self) -> torch.Tensor:
        """All actions of this rank, in order."""
        p = self.pipeline
        device = p.mesh.device
        self.batches = [batch.to(device) for batch in self.batches]
        self.nll = torch.zeros((), dtype=torch.float64, device=device)
        self.channels = Channels(p.mesh, self.plan, self._empty)
        for action in self.plan[p.mesh.pipeline.rank]:
            at = action.chunk, action.microbatch
            if action.kind == "F":
                self._forward(action, p.chunks[p.numbers.index(action.chunk)])
            elif action.kind == "W":
                run_jobs(self.jobs.pop(at))
            else:
                self._backward(action)
        self.channels.finish()
        return self.nll

    def _empty(self, message: Message) -> torch.Tensor:
        """Room for a message: hidden states and their gradients have one shape."""
        p = self.pipeline
        chunk: Any = p.chunks[p.numbers.index(message.chunk)]
        return chunk.empty_hidden(self.batches[message.microbatch])  # type: ignore[no-any-return]

    def _forward(self, action: Action, chunk: nn.Module) -> None:
        at, batch = (action.chunk, action.microbatch), self.batches[action.microbatch]
        hidden = None
        if need := needed(action, self.pipeline.count):
            hidden = self.entered[at] = self.channels.take(need).requires_grad_(torch.is_grad_enabled())
        last = action.chunk == self.pipeline.count - 1
        out = chunk(
            batch.tokens,
            cu_seqlens=batch.cu_seqlens,
            targets=batch.targets if last else None,
            sample_ids=batch.sample_ids,
            hidden=hidden,
        )
        if last:
            self.nll += out.nll.double()
            # A nll that is not finite makes the gradient NaN (0 * inf), so the norm alone tells of both.
            out = out.objective * (self.factor + 0.0 * out.nll)
        if out.requires_grad:
            self.left[at] = get_gradient_edge(out)
        else:
            self.entered.pop(at, None)
        if message := produced(action, self.pipeline.count):
            self.channels.give(message, out.detach())

    def _backward(self, action: Action) -> None:
        at = action.chunk, action.microbatch
        edge = self.left.pop(at)
        need = needed(action, self.pipeline.count)
        grad = self.channels.take(need) if need else None
        if action.kind == "I":
            self.pipeline.later.start()
        torch.autograd.backward([edge], None if grad is None else [grad])
        if action.kind == "I":
            self.jobs[at] = self.pipeline.later.take()
        if message := produced(action, self.pipeline.count):
            sent = self.entered.pop(at).grad
            assert sent is not None
            self.channels.give(message, sent)


class Channels:
    """Messages between pipeline ranks: first in, first out for each pair and direction.

    Sends never wait. One receive a sender is always posted ahead, in the order in which the schedule says its
    messages come, so that they travel while this rank computes.
    """

    def __init__(self, mesh: Mesh, plan: Sequence[Sequence[Action]], empty: Any) -> None:
        """`empty` makes room for a message."""
        self.axis, self.mesh, self.empty = mesh.pipeline, mesh, empty
        me = self.axis.rank
        self.holders = holders(plan)
        self.coming = {
            source: deque(found) for (source, target), found in messages(plan).items() if target == me
        }
        self.posted: dict[int, tuple[Message, torch.Tensor, dist.Work]] = {}
        self.arrived: dict[Message, torch.Tensor] = {}
        self.sent: deque[tuple[dist.Work, torch.Tensor]] = deque()
        for source in self.coming:
            self._post(source)

    def give(self, message: Message, tensor: torch.Tensor) -> None:
        """Send a message on its way; it is kept until it is gone."""
        target = self.holders[message.chunk]
        if target == self.axis.rank:
            self.arrived[message] = tensor
            return
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.axis.ranks[target], group=self._channel(self.axis.rank, target))
        assert work is not None
        self.sent.append((work, tensor))
        while self.sent and self.sent[0][0].is_completed():
            self.sent.popleft()[0].wait()

    def take(self, message: Message) -> torch.Tensor:
        """A message of this rank's, as soon as it is there."""
        while message not in self.arrived:
            # Who sends it: the neighbour chunk's rank.
            neighbour = message.chunk + (-1 if message.kind == "activation" else 1)
            source = self.holders[neighbour]
            found, tensor, work = self.posted.pop(source)
            work.wait()
            self._post(source)
            self.arrived[found] = tensor
        return self.arrived.pop(message)

    def finish(self) -> None:
        """Wait until everything sent is gone."""
        while self.sent:
            self.sent.popleft()[0].wait()
        assert not self.posted, "every message is taken"
        assert not self.arrived, "every message is taken"

    def _post(self, source: int) -> None:
        if self.coming[source]:
            message = self.coming[source].popleft()
            room = self.empty(message)
            work = dist.irecv(room, self.axis.ranks[source], group=self._channel(source, self.axis.rank))
            assert work is not None
            self.posted[source] = message, room, work

    def _channel(self, source: int, target: int) -> dist.ProcessGroup | None:
        return self.mesh.axes["down" if source < target else "up"].group
