"""ZeRO 0, plain data parallelism: every rank holds everything, gradients are summed over the ranks.

DeepSpeed is not used here: it shards nothing at this level, and refuses fp32 gradient accumulation over
16-bit weights (0.19.8: NotImplementedError, "unsupported mix"). Matrices stay whole, so Muon works.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bigtrain.config import Config
from bigtrain.engine.reference import ReferenceEngine, norm_of
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch
from bigtrain.parallel.partial import sum_parts
from bigtrain.parallel.pipeline import Pipeline

BUCKET_BYTES = 25 << 20
"""Gradients travel in buckets of this size (torch DDP's default) while backward makes the next ones."""


class ReplicaEngine(ReferenceEngine):
    """The reference engine with sums of gradients between backward and update, and one norm over all axes."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        """`model` is fp32, laid over the mesh, the same on all ranks of the replica axis; it becomes the engine's."""
        super().__init__(model, config)
        self.mesh = mesh
        self._ready: list[torch.Tensor] = []
        self._flying: list[tuple[dist.Work, torch.Tensor, list[torch.Tensor]]] = []
        self._last_microbatch = False
        if mesh.replica.size > 1 and not isinstance(model, Pipeline):
            # Hooks run in the order of registration: in 16 bits the one that adds into the master came first.
            for record, weight, master in zip(self.records, self.weights, self.masters, strict=True):
                if not record.summed:
                    weight.register_post_accumulate_grad_hook(self._when_done(master))  # type: ignore[no-untyped-call]

    def _when_done(self, master: torch.Tensor) -> Any:
        """A hook that hands a gradient over once the last microbatch has been added."""

        def hook(_: torch.Tensor) -> None:
            if self._last_microbatch:
                self._hand_over([master])

        return hook

    def _hand_over(self, masters: Sequence[torch.Tensor]) -> None:
        """These gradients are whole on this rank: sum them over the replicas, a bucket at a time."""
        for master in masters:
            assert master.grad is not None
            self._ready.append(master.grad)
            if sum(g.numel() for g in self._ready) * 4 >= BUCKET_BYTES:
                self._send()

    def _send(self) -> None:
        """Start the sum of the waiting gradients. Autograd's order, so the buckets, agree on all ranks."""
        flat = torch.cat([g.flatten() for g in self._ready])
        work = dist.all_reduce(flat, group=self.mesh.replica.group, async_op=True)
        assert work is not None
        self._flying.append((work, flat, self._ready))
        self._ready = []
        while self._flying[0][0].is_completed() and len(self._flying) > 1:
            self._land_one()  # a bucket is a copy of its gradients: no more of them than are under way

    def _backward(self, microbatches: Sequence[Batch], factor: float) -> torch.Tensor:
        if isinstance(self.model, Pipeline):
            nll = self.model.train_step(microbatches, factor)
            whole = [m for m, record in zip(self.masters, self.records, strict=True) if not record.summed]
        else:
            nll, whole = self._one_by_one(microbatches, factor), []
        parts = [(r, m) for r, m in zip(self.records, self.masters, strict=True) if r.summed]
        sum_parts(((record, grad_of(m)) for record, m in parts), self.mesh)
        if self.mesh.replica.size > 1:
            self._hand_over([*whole, *(m for _, m in parts)])
            self._land()
        if self.mesh.tensor.rank > 0:
            nll.zero_()  # tensor ranks know the same sum
        if self.mesh.world > 1:
            dist.all_reduce(nll, group=self.mesh.group)
        return nll

    def _one_by_one(self, microbatches: Sequence[Batch], factor: float) -> torch.Tensor:
        """Microbatch after microbatch; gradients go on their way while the last one's backward makes more."""
        self._last_microbatch = False
        nll = super()._backward(microbatches[:-1], factor) if len(microbatches) > 1 else None
        self._last_microbatch = True
        last = super()._backward(microbatches[-1:], factor)
        return last if nll is None else nll + last

    def _land(self) -> None:
        """Wait for the sums and put them where the gradients were."""
        if self._ready:
            self._send()
        while self._flying:
            self._land_one()

    def _land_one(self) -> None:
        work, flat, grads = self._flying.pop(0)
        work.wait()
        parts = torch.split(flat, [g.numel() for g in grads])
        torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])

    def _norm(self) -> torch.Tensor:
        """Every element once: each rank counts what its records say, the model axis adds up."""
        if self.mesh.model.size == 1:
            return super()._norm()
        counted = (m.grad for m, record in zip(self.masters, self.records, strict=True) if record.counted)
        square = norm_of(counted).to(self.mesh.device).double().square()
        dist.all_reduce(square, group=self.mesh.model.group)
        return square.sqrt()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """See `Engine.evaluate`. Collective over the axes that share a model."""
        if isinstance(self.model, Pipeline):
            nll = float(self.model.evaluate(batches))
        else:
            nll = super().evaluate(batches)
        return nll if self.mesh.tensor.rank == 0 else 0.0

    def pieces(self, owned: bool) -> Iterator[Piece]:
        """See `Engine.pieces`: replicas hold the same; for saving, they take turns tensor by tensor."""
        replica = self.mesh.replica
        counted = {(r.name, r.offset) for r in self.records if r.counted}
        for number, piece in zip(count(), super().pieces(owned)):
            mine = (piece.name, piece.offset) in counted and number % replica.size == replica.rank
            if not owned or mine:
                yield piece


def grad_of(master: torch.Tensor) -> torch.Tensor:
    """The gradient that a backward pass left."""
    assert master.grad is not None
    return master.grad
