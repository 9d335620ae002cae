"""What a model call receives: token ids, their targets and where documents end."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

IGNORE = -100
"""Target value of a position that is not counted in the loss (PyTorch's and Hugging Face's convention)."""


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens; T = B x S when flattened row by row."""

    tokens: torch.Tensor
    """(B, S) int64."""
    targets: torch.Tensor
    """(B, S) int64; IGNORE where nothing is predicted."""
    cu_seqlens: torch.Tensor | None
    """(documents + 1,) int32: document starts in the flattened T tokens, from 0 to T. Rows are boundaries too.
    None: every row is one document."""
    sample_ids: torch.Tensor
    """(B,) int64: the global sample number of each row; seeds dropout, so that no layout changes it."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def counted(self) -> int:
        """Tokens of this batch that count in the loss."""
        return int((self.targets != IGNORE).sum())
