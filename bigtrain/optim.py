"""Optimizers, which parameters they decay, and the learning rate as a pure function of the step.

All three optimizers decay weights the same, decoupled way (Loshchilov and Hutter, arXiv 1711.05101):
w -= lr * weight_decay * w beside the update, and never through the gradient.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from bigtrain.config import OptimConfig
from bigtrain.logical import logical_of

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",), "muon": ("momentum_buffer",)}
"""State tensors that each rule keeps for a parameter, all shaped like it."""

_EMBEDDINGS = ("embed_tokens", "embed_positions", "lm_head")


def learning_rate(config: OptimConfig, peak: float, step: int, total_steps: int) -> float:
    """The learning rate of step number `step` (from 0) of a run of `total_steps`.

    Warm-up rises linearly and reaches `peak` in its last step. cosine and linear fall from there to
    min_lr_ratio * peak in the last step; wsd falls in the last `decay_steps` as 1 - sqrt (Hägele et al. 2024,
    arXiv 2405.18392: better than a linear fall); inverse_sqrt is peak * sqrt(warmup / (step + 1)) (Vaswani et
    al. 2017). Beyond the last step it stays where it ended.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    low = config.min_lr_ratio * peak
    match config.schedule:
        case "constant":
            return peak
        case "inverse_sqrt":
            return peak * math.sqrt(max(1, warmup) / (step + 1))
        case "wsd":
            decay = config.decay_steps or max(1, total_steps // 10)
            done = (step + 1 - max(warmup, total_steps - decay)) / decay
            return peak - (peak - low) * math.sqrt(min(1.0, max(0.0, done)))
        case "cosine":
            fall = (1 - math.cos(math.pi * _done(step, warmup, total_steps))) / 2
        case "linear":
            fall = _done(step, warmup, total_steps)
    return peak - (peak - low) * fall


def _done(step: int, warmup: int, total_steps: int) -> float:
    """0 in the first step after warm-up, 1 in the last step."""
    return min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))


Named = Iterable[tuple[str, torch.nn.Parameter]]


def parameter_groups(named: Named, config: OptimConfig) -> list[dict[str, Any]]:
    """Split parameters by rule and decay; every group has "params", "rule" and "weight_decay".

    Matrices (two or more dimensions) decay, embeddings and the output head among them, as in GPT-3 and Llama;
    norms and biases do not. With kind = "muon" the rule of hidden matrices is "muon", that of everything else
    "adamw". Empty groups are left out; the largest comes first: DeepSpeed joins a group with the next until it has 5e8
    numbers, in a copy of both, so norms before matrices would cost 4 bytes a parameter.
    """
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = defaultdict(list)
    sizes: Counter[tuple[str, float]] = Counter()
    for name, parameter in named:
        # ZeRO-3 leaves an empty local tensor; the logical record knows the shape.
        shape = logical_of(parameter).shape if hasattr(parameter, "logical") else parameter.shape
        hidden = len(shape) == 2 and name.split(".")[0] not in _EMBEDDINGS
        rule = "adamw" if config.kind == "muon" and not hidden else config.kind
        key = rule, config.weight_decay if len(shape) >= 2 else 0.0
        groups[key].append(parameter)
        sizes[key] += math.prod(shape)
    return [{"params": groups[key], "rule": key[0], "weight_decay": key[1]} for key, _ in sizes.most_common()]


def build_optimizer(named: Named, config: OptimConfig, lr: float = 0.0) -> torch.optim.Optimizer:
    """The optimizer over `named` parameters; engines set each group's "lr" before every step.

    AdamW and SGD are torch's fused ones (CPU and CUDA). Muon's learning rate is scaled so that its updates
    have AdamW's root mean square (Liu et al. 2025, arXiv 2502.16982): one learning rate serves both rules.
    """
    groups = parameter_groups(named, config)
    if config.kind == "sgd":
        return DecoupledSGD(groups, lr=lr, momentum=config.momentum)
    if config.kind == "muon":
        return MuonAdamW(groups, config, lr)
    return _adamw(groups, config, lr)


def materialise_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, group: dict[str, Any]
) -> None:
    """Create the state of a parameter of `group` as zeros, which is what its first update would start from.

    So a checkpoint can be read into a fresh optimizer, without a step that changes anything.
    """
    state = optimizer.state[parameter]
    for moment in moments_of(group):
        state[moment] = torch.zeros_like(parameter, requires_grad=False)
    if group["rule"] == "adamw":
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def moments_of(group: dict[str, Any]) -> tuple[str, ...]:
    """State tensors kept for each parameter of a group (none for SGD without momentum)."""
    if group["rule"] == "sgd" and not group["momentum"]:
        return ()
    return MOMENTS[group["rule"]]


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the count of updates that bias correction uses."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class DecoupledSGD(torch.optim.SGD):
    """w -= lr * (momentum-averaged gradient + weight_decay * w), where the decay never enters the momentum.

    torch's SGD adds weight_decay * w to the gradient, so that the momentum multiplies it (L2 regularisation).
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        for group in groups:
            group["decay"] = group.pop("weight_decay")
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["decay"] and parameters:
                torch._foreach_mul_(parameters, 1.0 - group["lr"] * group["decay"])
        super().step()


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups with rule "muon", its AdamW for the others, behind one optimizer.

    Newton-Schulz needs whole matrices, so it cannot run on ZeRO's flat partitions.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig, lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        muon = [g for g in groups if g["rule"] == "muon"]
        rest = [g for g in groups if g["rule"] == "adamw"]
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            self.parts.append(
                torch.optim.Muon(muon, lr=lr, momentum=config.muon_momentum, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            self.parts.append(_adamw(rest, config, lr))
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of both; `closure` is not supported."""
        assert closure is None
        for part in self.parts:
            part.step()
