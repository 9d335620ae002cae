"""MinHash: two documents as short signatures whose share of equal numbers estimates how alike the documents are.

Broder 1997, "On the resemblance and containment of documents": under a random order of all shingles, two sets have the
same first shingle with the probability of their Jaccard index. Documents are sets of stretches of 8 characters, case
and the width of white space put aside, which suits scripts without spaces as well as code.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from bigtrain.data.order import key, mix_array

SHINGLE = 8
"""Characters of a shingle."""
MOST = 128
"""Numbers in a signature, at most."""
_SPACES = re.compile(r"\s+")
_CHUNK = 2048
"""Shingles at a time: 2048 x 128 x 4 bytes fit into a cache of 1 MiB."""

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Signatures = np.ndarray[Any, np.dtype[np.uint32]]


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Bands b of r numbers, b x r <= MOST, that find pairs from about a Jaccard index of `threshold` on.

    A pair of index s has all numbers of some band in common with probability 1 - (1 - s^r)^b, which rises most steeply
    near (1/b)^(1/r) (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4.2). Chosen is the most
    numbers with that point at most at the threshold, so that few are missed; `similar` sorts out the rest.
    """
    fitting = [(b, r) for r in range(1, MOST + 1) for b in [MOST // r] if (1 / b) ** (1 / r) <= threshold]
    return max(fitting, key=lambda pair: pair[1])


def shingles(text: str) -> Hashes:
    """A hash of every stretch of SHINGLE characters; of a shorter text, of the whole."""
    plain = _SPACES.sub(" ", text.casefold()).strip()
    points = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    count = max(len(points) - SHINGLE + 1, min(len(points), 1))
    letters = mix_array(points + np.uint64(1))
    rolled = np.zeros(count, np.uint64)
    for i in range(min(SHINGLE, len(points))):
        rolled *= np.uint64(0x9E3779B97F4A7C15)
        rolled += letters[i : i + count]
    return mix_array(rolled)


_FACTORS = np.array([key(2 * i) & 0xFFFFFFFF | 1 for i in range(MOST)], np.uint32)[:, None]
_TERMS = np.array([key(2 * i + 1) & 0xFFFFFFFF for i in range(MOST)], np.uint32)[:, None]


def signature(text: str, size: int = MOST) -> Signatures:
    """The first `size` numbers of a text's signature, uint32 (size,).

    Each is the least of a x + b modulo 2^32 (a odd, so an order of all x) over the high halves x of its shingles'
    hashes. A text without any character has the largest number everywhere.
    """
    found = np.full(size, 2**32 - 1, np.uint32)
    hashes = (shingles(text) >> np.uint64(32)).astype(np.uint32)
    for start in range(0, len(hashes), _CHUNK):
        mixed = _FACTORS[:size] * hashes[start : start + _CHUNK] + _TERMS[:size]
        found = np.minimum(found, mixed.min(axis=1))
    return found


def bands(signatures: Signatures, count: int, rows: int) -> Hashes:
    """One hash for each band of signatures (n, count x rows): uint64 (n, count)."""
    found = np.zeros((len(signatures), count), np.uint64)
    split = signatures.reshape(len(signatures), count, rows).astype(np.uint64)
    for row in range(rows):
        found = mix_array(found * np.uint64(0x9E3779B97F4A7C15) + split[:, :, row] + np.uint64(1))
    return found
