"""From a config to a model with its initial weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.logical import mark_logical
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
    device = torch.device(device)
    if device.type != "meta":
        model.to_empty(device=device)
        if isinstance(model, Transformer):
            model.tie()
    mark_logical(model)
    if device.type != "meta":
        initialise(model, config, seed)
    return model
