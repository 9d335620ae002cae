"""From a config to a model with its initial weights."""

from __future__ import annotations

import torch

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.logical import mark_logical
from bigtrain.model.init import initialise
from bigtrain.model.lstm import LSTM
from bigtrain.model.transformer import Transformer


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
    with torch.device("meta"):
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
