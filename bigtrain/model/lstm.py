"""The primer's example: embedding, stacked LSTM with dropout, linear. The smallest model of the trainer.

Shapes: B batch, S sequence, T = B x S packed tokens, C width, V vocab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from bigtrain.config import LossConfig, ModelConfig
from bigtrain.model.cache import Cache
from bigtrain.model.hashing import random_bits, row_keys
from bigtrain.model.loss import Head, LossSum


class LSTMCache(Cache):
    """The hidden and cell state of every layer, (layers, B, C) each."""

    def __init__(self, config: ModelConfig, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(rows, device)
        shape = (config.layers, rows, config.width)
        self.h = torch.zeros(shape, device=device, dtype=dtype)
        self.c = torch.zeros(shape, device=device, dtype=dtype)


class LSTM(nn.Module):
    """Embedding, `layers` x LSTM, linear; dropout after each LSTM layer, the last one included."""

    def __init__(
        self,
        config: ModelConfig,
        loss: LossConfig = LossConfig(),  # noqa: B008 (frozen)
        *,
        kernels: str = "auto",
        seed: int = 0,
    ) -> None:
        """`seed` decides the dropout masks, together with `sample_ids`."""
        super().__init__()
        C = config.width
        self.config = config
        self.seed = seed
        self.embed_tokens = nn.Embedding(config.vocab_size, C)
        self.layers = nn.ModuleList(nn.LSTM(C, C, batch_first=True) for _ in range(config.layers))
        self.lm_head = Head(C, config.vocab_size, loss, kernels=kernels, bias=True)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        cache: LSTMCache | None = None,
    ) -> torch.Tensor | LossSum:
        """Logits (B, S, V), or with `targets` (B, S) the summed loss; as `Transformer.forward`.

        The state starts at zero in each document, or where the cache left it. While training with dropout,
        sample_ids (B,) int64 are required: masks depend on them and not on the layout.
        """
        S = tokens.shape[1]
        segments = cut(tokens, cu_seqlens, cache)
        x = self.embed_tokens(tokens)
        for i, lstm in enumerate(self.layers):
            if cache is None:
                x, _ = run(lstm, x, segments, None)
            else:
                x, (cache.h[i], cache.c[i]) = run(lstm, x, segments, (cache.h[i], cache.c[i]))
            if self.training and self.config.dropout:
                assert sample_ids is not None, "an LSTM with dropout is trained with sample_ids"
                x = x * self.dropout_mask(sample_ids, S, i).to(x.dtype)
        if cache is not None:
            cache.advance(S)
        return self.lm_head(x, targets)  # type: ignore[no-any-return]

    def dropout_mask(self, sample_ids: torch.Tensor, S: int, layer: int) -> torch.Tensor:
        """0 or 1 / (1 - rate) for each feature of each token: (B,) int64 -> (B, S, C) fp32.

        A pure function of (seed, layer, sample, position, feature): no layout and no restart changes it. The
        rate is rounded to 1/65536, because each hash gives two 16-bit numbers.
        """
        C = self.config.width
        # A number for each token of the run; sequences are shorter than 2^20 tokens.
        token = (sample_ids[:, None] << 20) + torch.arange(S, device=sample_ids.device)
        a, b = row_keys(token.flatten(), f"{self.seed}/dropout/{layer}")
        counter = torch.arange(-(-C // 2), dtype=torch.int32, device=sample_ids.device)
        lanes = random_bits(counter + a[:, None], b[:, None]).view(torch.int16)[:, :C]
        dropped = round(self.config.dropout * 65536)
        return ((lanes >= dropped - 32768) * (65536 / (65536 - dropped))).view(-1, S, C)

    def new_cache(self, rows: int, length: int) -> LSTMCache:
        """An empty cache for `rows` sequences; their length does not matter here."""
        weight = self.embed_tokens.weight
        return LSTMCache(self.config, rows, weight.device, weight.dtype)


class Segment(NamedTuple):
    """Columns of the (B, S) tokens over which no row starts or ends anything."""

    size: int
    keep: torch.Tensor | None
    """(B, 1) bool: rows whose state goes on into this segment; the others start at zero. None: all go on."""
    live: torch.Tensor | None
    """(B, 1) bool: rows with real tokens here; the others' state stays as it is. None: all are live."""


def cut(tokens: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Cache | None) -> list[Segment]:
    """Cut the sequence wherever a document starts in some row, or wherever a row's real tokens end."""
    B, S = tokens.shape
    if cache is not None and cache.counts is not None:
        ends = cache.counts.cpu()
        bounds = [0, *sorted(set(ends.tolist()) - {0, S}), S]
        live = [(ends > start)[:, None].to(tokens.device) for start in bounds[:-1]]
        return [Segment(b - a, None, on) for a, b, on in zip(bounds, bounds[1:], live, strict=False)]
    if cu_seqlens is None or len(cu_seqlens) == B + 1:  # B + 1: rows are the only boundaries
        return [Segment(S, None, None)]
    starts = cu_seqlens[:-1].cpu().long()  # split points have to be known to Python
    fresh = torch.zeros(B * S, dtype=torch.bool)
    fresh[starts] = True
    fresh = fresh.view(B, S)
    bounds = [*fresh.any(0).nonzero().flatten().tolist(), S]
    keep = [~fresh[:, a : a + 1].to(tokens.device) for a in bounds[:-1]]
    return [Segment(b - a, on, None) for a, b, on in zip(bounds, bounds[1:], keep, strict=False)]


State = tuple[torch.Tensor, torch.Tensor]


def run(
    lstm: nn.Module, x: torch.Tensor, segments: list[Segment], state: State | None
) -> tuple[torch.Tensor, State]:
    """One LSTM layer over x (B, S, C), segment by segment; state is (h, c), (B, C) each."""
    zeros = x.new_zeros(x.shape[0], x.shape[2])
    h, c = state or (zeros, zeros)
    outputs = []
    parts = torch.split(x, [s.size for s in segments], dim=1)
    for part, segment in zip(parts, segments, strict=True):
        if segment.keep is not None:
            h, c = h.where(segment.keep, zeros), c.where(segment.keep, zeros)
        y, (new_h, new_c) = lstm(part, (h[None], c[None]))
        outputs.append(y)
        if segment.live is None:
            h, c = new_h[0], new_c[0]
        else:
            h, c = new_h[0].where(segment.live, h), new_c[0].where(segment.live, c)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), (h, c)
