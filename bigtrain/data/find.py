"""Which documents lie at a place of a corpus, by binary search in the shard's index: nothing is read through."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigtrain.data.corpus import Corpus
from bigtrain.data.shards import DTYPES, HEADER
from bigtrain.errors import UserError


class Found(NamedTuple):
    """A document, or a part of one, in a stretch of tokens."""

    shard: Path
    """Its `.bin`."""
    document: int
    """Number in the shard, from 0."""
    begins: int
    """First token of the stretch that is of the document, counted in the document."""
    start: int
    """The same token's place in the corpus, as Corpus.read counts."""
    size: int
    """Tokens of it in the stretch."""
    tokens: int
    """Of the whole document."""


def documents_at(corpus: Corpus, start: int, size: int) -> Iterator[Found]:
    """The documents of tokens start .. start + size - 1 in their order. UserError for an index that is not there."""
    end = start + size
    opened: dict[Path, _Borders] = {}
    while start < end:
        shard, offset, tokens = corpus.locate(start)
        if shard not in opened:
            opened[shard] = _Borders(corpus.local(shard.with_suffix(".idx")), tokens)
        borders = opened[shard]
        number = borders.document_of(offset)
        first, behind = borders.place(number), borders.place(number + 1)
        taken = min(behind - offset, end - start)
        yield Found(shard, number, offset - first, start, taken, behind - first)
        start += taken


class _Borders:
    """Where the documents of a shard begin, read from its `.idx` a number at a time."""

    def __init__(self, file: Path, tokens: int) -> None:
        try:
            header = np.memmap(file, np.uint8, "r", 0, (HEADER.size,)).tobytes()
            _, _, code, sequences, borders = HEADER.unpack(header)
            behind = HEADER.size + 4 * sequences  # the lengths, which the pointers say too
            self._pointers = np.memmap(file, "<i8", "r", behind, (sequences,))
            self._borders = np.memmap(file, "<i8", "r", behind + 8 * sequences, (borders,))
        except (OSError, ValueError) as e:
            raise UserError(
                f"cannot be read as a shard's index ({e})",
                where=str(file),
                do="prepare the corpus again, or copy this file from its source",
            ) from e
        self._width = np.dtype(DTYPES[code]).itemsize
        self._tokens = tokens

    def place(self, document: int) -> int:
        """First token of a document; behind the last one the end of the shard."""
        sequence = int(self._borders[document])
        return (
            int(self._pointers[sequence]) // self._width if sequence < len(self._pointers) else self._tokens
        )

    def document_of(self, token: int) -> int:
        """The document that a token of the shard lies in."""
        return bisect_right(range(len(self._borders) - 1), token, key=self.place) - 1
