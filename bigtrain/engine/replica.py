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
from bigtrain.engine.reference import ReferenceEngine
from bigtrain.logical import Piece
from bigtrain.mesh import Mesh
from bigtrain.model.batch import Batch

BUCKET_BYTES = 25 << 20
"""Gradients travel in buckets of this size (torch DDP's default) while backward makes the next ones."""


class ReplicaEngine(ReferenceEngine):
    """The reference engine with one all-reduce of the gradients between backward and update."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh) -> None:
        """`model` is fp32, the same on all ranks, and becomes the engine's."""
        super().__init__(model, config)
        self.mesh = mesh
        self._ready: list[torch.Tensor] = []
        self._flying: list[tuple[dist.Work, torch.Tensor, list[torch.Tensor]]] = []
        self._last_microbatch = False
        if mesh.world > 1:
            # Hooks run in the order of registration: in 16 bits the one that adds into the master came first.
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.register_post_accumulate_grad_hook(self._when_done(master))  # type: ignore[no-untyped-call]

    def _when_done(self, master: torch.Tensor) -> Any:
        """A hook that hands a gradient over once the last microbatch has been added."""

        def hook(_: torch.Tensor) -> None:
            if self._last_microbatch:
                assert master.grad is not None
                self._ready.append(master.grad)
                if sum(g.numel() for g in self._ready) * 4 >= BUCKET_BYTES:
                    self._send()

        return hook

    def _send(self) -> None:
        """Start the sum of the waiting gradients. Autograd's order, so the buckets, agree on all ranks."""
        flat = torch.cat([g.flatten() for g in self._ready])
        work = dist.all_reduce(flat, group=self.mesh.group, async_op=True)
        assert work is not None
        self._flying.append((work, flat, self._ready))
        self._ready = []

    def _backward(self, microbatches: Sequence[Batch], factor: float) -> torch.Tensor:
        self._last_microbatch = False
        nll = super()._backward(microbatches[:-1], factor) if len(microbatches) > 1 else None
        self._last_microbatch = True
        last = super()._backward(microbatches[-1:], factor)
        nll = last if nll is None else nll + last
        if self.mesh.world == 1:
            return nll
        if self._ready:
            self._send()
        for work, flat, grads in self._flying:
            work.wait()
            parts = torch.split(flat, [g.numel() for g in grads])
            torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
        self._flying = []
        dist.all_reduce(nll, group=self.mesh.group)
        return nll

    def pieces(self, owned: bool) -> Iterator[Piece]:
        """See `Engine.pieces`: every rank holds all; for saving, they take turns tensor by tensor."""
        for number, piece in zip(count(), super().pieces(owned)):
            if not owned or number % self.mesh.data_size == self.mesh.data_rank:
                yield piece
