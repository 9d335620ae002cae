"""A fair sample of the text to train a tokenizer on, in bounded memory and one pass."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator

_CHUNK = 2**16
"""Characters: long documents are sampled in stretches of about this length, cut at line ends."""


def sample_texts(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Stretches of the texts, together about `max_bytes` of UTF-8 (everything, if there is less).

    Each stretch draws a number from (seed, its text) and the lowest are kept: every stretch has the same
    chance, and neither the choice nor its order depends on the order of the texts.
    """
    kept: list[tuple[int, str]] = []  # a heap with the highest number first
    size = 0
    for text in texts:
        for stretch in stretches(text):
            data = stretch.encode()
            number = _draw(seed, data)
            if size > max_bytes and number > -kept[0][0]:
                continue
            heapq.heappush(kept, (-number, stretch))
            size += len(data)
            while len(kept) > 1 and size - len(kept[0][1].encode()) >= max_bytes:
                size -= len(heapq.heappop(kept)[1].encode())
    return [stretch for _, stretch in sorted(kept, reverse=True)]


def stretches(text: str) -> Iterator[str]:
    """Cut a long text behind the first line end after each _CHUNK characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _CHUNK) + 1
        end = end if 0 < end <= start + 2 * _CHUNK else start + _CHUNK
        yield text[start:end]
        start = end


def _draw(seed: int, data: bytes) -> int:
    key = str(seed).encode()[:64]
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "big")
