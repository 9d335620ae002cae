"""The primer's example: embedding, stacked LSTM with dropout, linear. The smallest model of the trainer.

Shapes: B batch, S sequence, T = B x S packed tokens, C width, V vocab.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

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
        B, S = tokens.shape
        order = packed_order(tokens, cu_seqlens, cache)
        # From here to the head, tokens are in packed order: the documents' first tokens, their second, ...
        x = self.embed_tokens(tokens.flatten()[order.data])
        for i, lstm in enumerate(self.layers):
            state = None if cache is None else (cache.h[i : i + 1], cache.c[i : i + 1])
            packed, state = lstm(order._replace(data=x), state)
            x = packed.data
            if cache is not None:
                cache.h[i], cache.c[i] = state[0][0], state[1][0]
            if self.training and self.config.dropout:
                assert sample_ids is not None, "an LSTM with dropout is trained with sample_ids"
                # One number for each token of the run; sequences are shorter than 2^20 tokens.
                token = (sample_ids[:, None] << 20) + torch.arange(S, device=tokens.device)
                x = x * self.dropout_mask(token.flatten()[order.data], i).to(x.dtype)
        place = torch.zeros(B * S, dtype=torch.int64, device=tokens.device)
        place[order.data] = torch.arange(len(order.data), device=tokens.device)
        if cache is not None:
            cache.advance(S)
        return self.lm_head(x[place].view(B, S, -1), targets)  # type: ignore[no-any-return]

    def dropout_mask(self, token: torch.Tensor, layer: int) -> torch.Tensor:
        """0 or 1 / (1 - rate): (N,) int64 numbers of tokens in the run -> (N, C) fp32.

        A pure function of (seed, layer, token), so that no layout and no restart changes it. The rate is
        rounded to 1/65536: each hash gives two 16-bit numbers.
        """
        C = self.config.width
        a, b = row_keys(token, f"{self.seed}/dropout/{layer}")
        counter = torch.arange(-(-C // 2), dtype=torch.int32, device=token.device)
        lanes = random_bits(counter + a[:, None], b[:, None]).view(torch.int16)[:, :C]
        dropped = round(self.config.dropout * 65536)
        return (lanes >= dropped - 32768) * (65536 / (65536 - dropped))

    def new_cache(self, rows: int, length: int) -> LSTMCache:
        """An empty cache for `rows` sequences; their length does not matter here."""
        weight = self.embed_tokens.weight
        return LSTMCache(self.config, rows, weight.device, weight.dtype)


def packed_order(
    tokens: torch.Tensor, cu_seqlens: torch.Tensor | None, cache: Cache | None
) -> PackedSequence:
    """The order in which PyTorch's LSTM wants the T = B x S tokens: `data` holds their flat indexes.

    Each document is a sequence of its own, so its state starts at zero. Packed sequences are also 1.4x faster
    on a CPU than padded ones (16 x 256 tokens of width 256).
    """
    B, S = tokens.shape
    starts = torch.arange(0, B * S, S)
    lengths = torch.full((B,), S)
    if cache is not None and cache.counts is not None:
        lengths = cache.counts.cpu()
    elif cu_seqlens is not None:
        bounds = cu_seqlens.cpu().long()  # PyTorch wants lengths on the CPU
        starts, lengths = bounds[:-1], bounds.diff()
    indexes = starts[:, None] + torch.arange(int(lengths.max()))
    return pack_padded_sequence(indexes.to(tokens.device), lengths, batch_first=True, enforce_sorted=False)
