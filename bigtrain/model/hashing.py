"""Random bits as a pure function of what they are for: no generator, no state, no layout.

Initial weights and dropout masks are numbered by rows and columns; a text (seed and name) and the row give
two keys, the column is the counter. Integer operations only, so that every device gives the same bits.
"""

from __future__ import annotations

import hashlib

import torch


def row_keys(rows: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 keys a row (R,), from a hash of the text and the row's number (R,) int64."""
    digest = hashlib.sha256(text.encode()).digest()
    words = [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)]
    first, second = (mix64(rows + _wrap(word)) for word in words)
    return (first >> 32).to(torch.int32), (second >> 32).to(torch.int32)


def _wrap(x: int) -> int:
    """As a signed 64-bit integer."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def mix64(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 (Steele et al. 2014) of int64 numbers: a bijection whose every output bit looks random."""
    x = x * _wrap(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _wrap(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _wrap(0x94D049BB133111EB)
    return x ^ (x >> 31 & (1 << 33) - 1)


def random_bits(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """32 random bits an element, as int32: the counter mixed, the key added, mixed again.

    `counter` is overwritten. int32 rather than int64 because AVX2 multiplies only the former in one
    instruction.
    """
    return _mix32(_mix32(counter).bitwise_xor_(key))


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 (Wellons 2018, hash-prospector), in place: each output bit depends on every input bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)), (16, 0)):
        x ^= (x >> shift).bitwise_and_((1 << 32 - shift) - 1)  # the mask makes the shift a logical one
        if factor:
            x *= factor
    return x
