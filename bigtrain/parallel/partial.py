"""Gradients that each rank knows only a part of: norms under sequence parallelism, shared kv heads, tied embeddings.

Each parameter's logical record names the axis to sum over (`Logical.summed`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bigtrain.logical import Logical, logical_of
from bigtrain.mesh import Mesh
from bigtrain.parallel.collectives import sum_together


def sum_parts(gradients: Iterable[tuple[Logical, torch.Tensor]], mesh: Mesh) -> None:
    """Make partial gradients whole, in place: one collective an axis, after all microbatches."""
    by_axis: dict[str, list[torch.Tensor]] = defaultdict(list)
    for record, gradient in gradients:
        if record.summed:
            by_axis[record.summed].append(gradient)
    for name in sorted(by_axis):
        sum_together(by_axis[name], mesh.axes[name])


class SumAtLast:
    """The same for an engine that takes gradients away while backward makes them, as ZeRO does.

    Partial gradients are kept here, in fp32, and the engine gets zeros, until the last microbatch, when it gets the
    sum: one small collective a parameter and step, not one a microbatch.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
        self.last = True
        """Set to False before every backward pass but the last of a step."""
        self._kept: dict[int, torch.Tensor] = {}
        for parameter in parameters:
            axis = logical_of(parameter).summed
            if axis:
                parameter.register_hook(self._hook(id(parameter), mesh.axes[axis].group))

    def _hook(self, key: int, group: dist.ProcessGroup | None) -> Any:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.float() if key not in self._kept else self._kept.pop(key).add_(gradient)
            if not self.last:
                self._kept[key] = total.clone() if total is gradient else total
                return torch.zeros_like(gradient)
            total = total.contiguous().clone() if total is gradient else total
            dist.all_reduce(total, group=group)
            return total.to(gradient.dtype)

        return hook
