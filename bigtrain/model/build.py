"""From a config to a model with its initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.logical import logical_of, mark_logical
from bigtrain.model.init import initialise
from bigtrain.model.lstm import LSTM
from bigtrain.model.transformer import Transformer


class _NoDefaultValues(TorchFunctionMode):
    """Leaves PyTorch's default values out while shapes are made: on meta they mean nothing, and they import
    torch._dynamo (1.3 s of start-up)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return named["tensor"] if "tensor" in named else args[0]
        return args[0] if func is torch.Tensor.uniform_ else func(*args, **named)


def build_model(
    config: ModelConfig,
    loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
    *,
    kernels: str = "auto",
    recompute: str = "none",
    device: torch.device | str = "cpu",
    seed: int = 1,
) -> Transformer | LSTM:
    """A whole fp32 model on `device`: parameters marked with their logical names, initialised from `seed`.

    Built on the meta device first: no weight is ever filled twice. device="meta" gives shapes only.
    """
    with torch.device("meta"), _NoDefaultValues():
        model: Transformer | LSTM
        if config.kind == "lstm":
            model = LSTM(config, loss, kernels=kernels, seed=seed)
        else:
            model = Transformer(config, loss, kernels=kernels, recompute=recompute)
    mark_logical(model)
    if torch.device(device).type != "meta":
        materialise(model, device)
        initialise(model, config, seed)
    return model


def materialise(model: nn.Module, device: torch.device | str) -> None:
    """Replace meta parameters by empty ones on `device`: records are kept, tied ones stay one."""
    made: dict[nn.Parameter, Any] = {}
    for module in model.modules():
        for name, meta in module._parameters.items():
            if meta is None:
                continue
            if meta not in made:
                made[meta] = nn.Parameter(torch.empty_like(meta, device=device))
                made[meta].logical = logical_of(meta)
            module._parameters[name] = made[meta]
            if isinstance(module, nn.LSTM):  # it keeps a second list of its weights
                setattr(module, name, made[meta])
