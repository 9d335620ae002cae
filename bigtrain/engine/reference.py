"""The reference: plain PyTorch, one process. Every other engine and layout is compared with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bigtrain.config import Config
from bigtrain.engine.protocol import Refuse, StepResult
from bigtrain.engine.scaler import LossScaler
from bigtrain.logical import Piece, logical_of
from bigtrain.model.batch import Batch
from bigtrain.optim import build_optimizer, materialise_state, moments_of, set_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ReferenceEngine:
    """Forward, backward, clip, update. In 16 bits the model computes with rounded copies of fp32 masters."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        """`model` is fp32 and becomes the engine's; 16-bit precision converts it in place."""
        self.model = model.train()
        self.clip = config.optim.clip
        self.device = next(model.parameters()).device
        self.updates = 0
        self.scaler = LossScaler() if config.train.precision == "fp16" else None
        # parameters() gives a tied weight once, so it is counted, clipped and updated once.
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.records = [logical_of(p) for p in self.weights]
        self.masters = self.weights
        """The fp32 weights that the optimizer updates; the model's own in fp32."""
        dtype = DTYPES[config.train.precision]
        if dtype != torch.float32:
            model.to(dtype)
            # Masters start from the rounded weights, as ZeRO's do: every engine takes the same first step.
            self.masters = [nn.Parameter(p.detach().float()) for p in self.weights]
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.register_post_accumulate_grad_hook(_accumulate_into(master))  # type: ignore[no-untyped-call]
        names = [record.name for record in self.records]
        self.optimizer = build_optimizer(zip(names, self.masters, strict=True), config.optim)
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                materialise_state(self.optimizer, master, group)

    def train_step(
        self, microbatches: Sequence[Batch], counted: int, lr: float, refuse: Refuse | None = None
    ) -> StepResult:
        """See `Engine.train_step`. One synchronisation with the device a step, before the update."""
        scale = self.scaler.scale if self.scaler else 1.0
        loss, norm = self._gradients(microbatches, max(counted, 1), scale)
        overflow = not math.isfinite(norm)
        skipped = overflow or (refuse is not None and refuse(loss, norm))
        if not skipped:
            self._update(norm, scale, lr)
        for master in self.masters:
            master.grad = None
        if self.scaler:
            self.scaler.update(overflow=overflow)
        return StepResult(loss, math.inf if overflow else norm, skipped, scale)

    def _gradients(self, microbatches: Sequence[Batch], counted: int, scale: float) -> tuple[float, float]:
        """Fill the masters' .grad with scale x the gradient; loss and unscaled gradient norm."""
        nll = self._backward(microbatches, scale / counted)
        total, scaled_norm = torch.stack([nll, self._norm().double()]).tolist()
        return total / counted, scaled_norm / scale

    def _norm(self) -> torch.Tensor:
        """Norm of all gradients."""
        return norm_of(master.grad for master in self.masters)

    def _backward(self, microbatches: Sequence[Batch], factor: float) -> torch.Tensor:
        """Add factor x the gradient of every microbatch; the sum of plain cross-entropy, float64."""
        losses = []
        for batch in microbatches:
            out = self._forward(batch)
            # A nll that is not finite makes the gradient NaN (0 * inf), so the norm alone tells of both.
            (out.objective * (factor + 0.0 * out.nll)).backward()
            losses.append(out.nll)
        return torch.stack(losses).double().sum()

    @torch.no_grad()
    def _update(self, norm: float, scale: float, lr: float) -> None:
        """Unscale, clip, step, and round the masters into the weights."""
        factor = 1.0 / scale
        if self.clip and norm > self.clip:
            factor *= self.clip / (norm + 1e-6)  # torch's and DeepSpeed's guard against a zero norm
        grads = [master.grad for master in self.masters if master.grad is not None]
        if factor != 1.0:
            torch._foreach_mul_(grads, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.updates += 1
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.masters is not self.weights:
            torch._foreach_copy_([*self.weights], [*self.masters])

    def _forward(self, batch: Batch) -> Any:
        batch = batch.to(self.device)
        return self.model(
            batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets, sample_ids=batch.sample_ids
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> float:
        """See `Engine.evaluate`."""
        self.model.eval()
        nll = math.fsum(float(self._forward(batch).nll) for batch in batches)
        self.model.train()
        return nll

    def pieces(self, owned: bool) -> Iterator[Piece]:
        """See `Engine.pieces`: one rank holds and owns every logical tensor whole."""
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        for record, master in zip(self.records, self.masters, strict=True):
            state = self.optimizer.state[master]
            views = {"master": master.detach(), **{m: state[m] for m in moments_of(groups[master])}}
            for kind, view in views.items():
                yield Piece(kind, record.name, record.shape, record.offset, view)

    def extra_state(self) -> dict[str, Any]:
        """See `Engine.extra_state`."""
        return {"updates": self.updates, "loss_scaler": self.scaler.state() if self.scaler else None}

    def loaded(self, extra: dict[str, Any]) -> None:
        """See `Engine.loaded`. A run that changes to fp16 starts with a fresh loss scaler."""
        self.updates = int(extra["updates"])
        set_step(self.optimizer, self.updates)
        if self.scaler and extra.get("loss_scaler"):
            self.scaler = LossScaler(**extra["loss_scaler"])
        self._refresh()

    def close(self) -> None:
        """Nothing to free beyond what Python frees."""


def norm_of(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Euclidean norm of many tensors as one; 0 of none."""
    found = [g for g in gradients if g is not None]
    if not found:
        return torch.zeros(())
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
    return norm


def _accumulate_into(master: nn.Parameter) -> Any:
    """A hook that adds a 16-bit gradient to the master's fp32 one as soon as a backward pass has made it."""

    def hook(weight: torch.Tensor) -> None:
        if (
            weight.grad is None
        ):  # a zero-bubble schedule puts weight gradients off, and torch calls all the same
            return
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    return hook
