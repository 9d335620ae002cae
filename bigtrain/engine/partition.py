"""Build a model for ZeRO-3 parameter by parameter, so that no rank ever holds it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bigtrain.config import Config
from bigtrain.engine.reference import DTYPES
from bigtrain.logical import logical_of
from bigtrain.mesh import Mesh
from bigtrain.model.init import initialise


def partition_as_built(
    deepspeed: Any, told: dict[str, Any], model: nn.Module, config: Config, mesh: Mesh
) -> None:
    """Replace every meta parameter of `model` by one that is filled with its initial values and partitioned.

    One parameter at a time exists in full, in fp32 and then in the precision of the run. `told` is DeepSpeed's
    configuration. Collective: DeepSpeed sends each parameter from the first replica before it cuts it.
    """
    dtype = DTYPES[config.train.precision]
    built: dict[nn.Parameter, Any] = {}
    for module in model.modules():
        for name, meta in module._parameters.items():
            if meta is None:
                continue
            if meta not in built:  # a tied weight stays one
                built[meta] = fill(meta, config, mesh.device, dtype)
                convert(deepspeed, told, list(built.values()), dtype, mesh)
            module._parameters[name] = built[meta]


def fill(meta: nn.Parameter, config: Config, device: Any, dtype: torch.dtype) -> nn.Parameter:
    """The parameter's initial values in `dtype`, with its logical record."""
    whole: Any = nn.Parameter(torch.empty(meta.shape, dtype=torch.float32, device=device))
    whole.logical = logical_of(meta)
    initialise(nn.ParameterList([whole]), config.model, config.train.seed)
    whole.data = whole.data.to(dtype)
    return whole  # type: ignore[no-any-return]


def convert(
    deepspeed: Any, told: dict[str, Any], parameters: list[Any], dtype: torch.dtype, mesh: Mesh
) -> None:
    """Cut the newest parameter; the first one sets DeepSpeed's partitioning up for the others."""
    if len(parameters) > 1:
        parameters[0].convert_to_zero_parameters(param_list=parameters[-1:])
    else:
        group = None  # all ranks
        if mesh.model.size > 1:
            group = mesh.replica.group or mesh.axes["alone"].group
        deepspeed.zero.Init(
            module=nn.ParameterList(parameters),
            config_dict_or_path=told,
            dtype=dtype,
            data_parallel_group=group,
        )
