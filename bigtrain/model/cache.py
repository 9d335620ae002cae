"""What generation remembers between calls, so that each new token costs one token's work.

Rows may have unequal lengths. A call brings S tokens a row, of which the first `counts[row]` are real and the
rest is padding on the right: padding lands in slots behind the real tokens, where no real query looks, and is
overwritten by the tokens that come next.
"""

from __future__ import annotations

import torch

from bigtrain.config import ModelConfig


class Cache:
    """Row lengths and the promise about the next call; the models add what they keep."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        """(B,) real tokens each row has seen."""
        self.end = 0
        """An upper bound of `lengths` known without asking the device."""
        self.counts: torch.Tensor | None = None
        """(B,) real tokens a row in the next call; None: all of them."""
        self._most = 0

    def expect(self, counts: list[int]) -> None:
        """Announce how many tokens of each row are real in the next call; the others are padding."""
        self.counts = torch.tensor(counts, dtype=torch.int64, device=self.lengths.device)
        self._most = max(counts)

    def advance(self, S: int) -> None:
        """Called by the model at the end of a forward pass over S tokens a row."""
        if self.counts is None:
            self.lengths += S
            self.end += S
        else:
            self.lengths += self.counts
            self.end += self._most
        self.counts = None


class KVCache(Cache):
    """Keys and values of every layer, allocated once."""

    def __init__(
        self, config: ModelConfig, rows: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Room for `length` tokens in each of `rows` rows: 2 x layers x rows x length x K x D numbers."""
        super().__init__(rows, device)
        shape = (config.layers, rows, length, config.num_kv_heads, config.dim_per_head)
        # Zeros, not empty: what the mask hides still meets a weight of 0, and 0 x NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._row = torch.arange(rows, device=device)[:, None]

    def append(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, S, K, D) at positions (B, S); returns all keys and values so far (B, L, K, D)."""
        end = self.end + k.shape[1]
        keys, values = self.keys[layer], self.values[layer]
        keys[self._row, positions] = k
        values[self._row, positions] = v
        return keys[:, :end], values[:, :end]
