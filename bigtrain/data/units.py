"""Units of work: the inputs cut into parts of about one size, by the inputs alone, never by who will work.

A unit becomes shards of its own, so the shards are the same for any number of workers. JSON lines are cut at any
byte (a line belongs to the part that it begins in), parquet between row groups; a compressed file and a file that is
one document stay whole, and small files are taken together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bigtrain.data.sources import Source
from bigtrain.data.unpack import optional

SMALLEST, LARGEST = 16 * 10**6, 10**9
"""Bytes of a unit. The smallest takes 5 s with SentencePiece's BPE; the largest gives shards of about 300 million
tokens, so that a corpus of 10 TB has 10,000."""
_PARTS = 1024
"""Units that a corpus is cut into between these limits: enough for a thousand workers."""


@dataclass(frozen=True)
class Piece:
    """A file, or a part of one."""

    source: Source
    part: tuple[int, int] | None = None
    """None: the whole file. JSON lines: those that begin at bytes [a, b). Parquet: row groups [a, b)."""
    size: int = 0
    """Bytes on disk."""


@dataclass(frozen=True)
class Unit:
    """What one worker takes at a time."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(piece.size for piece in self.pieces)


def whole(source: Source) -> Piece:
    """A file as one piece."""
    return Piece(source, None, source.size)


def unit_bytes(sources: Sequence[Source]) -> int:
    """The size of a unit that suits a corpus."""
    return min(LARGEST, max(SMALLEST, sum(s.size for s in sources) // _PARTS))


def units_of(sources: Sequence[Source], target: int) -> list[Unit]:
    """The inputs in units of about `target` bytes, in their order; at least one unit."""
    units: list[Unit] = []
    pieces: list[Piece] = []
    filled = 0
    for piece in (piece for source in sources for piece in _pieces(source, target)):
        if pieces and filled + piece.size // 2 > target:
            units.append(Unit(len(units), tuple(pieces)))
            pieces, filled = [], 0
        pieces.append(piece)
        filled += piece.size
    return [*units, Unit(len(units), tuple(pieces))]


def _pieces(source: Source, target: int) -> Iterator[Piece]:
    """Equal parts of a file that is much larger than a unit and can be cut."""
    count = round(source.size / target)
    if count < 2 or source.packed or source.kind == "text":
        yield whole(source)
        return
    steps = source.size if source.kind == "jsonl" else row_groups(source.path)
    count = min(count, max(steps, 1))
    borders = [steps * i // count for i in range(count + 1)]
    for a, b in pairwise(borders):
        yield Piece(source, (a, b), source.size * b // steps - source.size * a // steps if steps else 0)


def row_groups(path: Path) -> int:
    """Of a parquet file; 1 if it cannot be read, which the worker that reads it will say."""
    arrow = optional("pyarrow", "parquet", path)
    parquet = optional("pyarrow.parquet", "parquet", path)
    try:
        return int(parquet.read_metadata(path).num_row_groups)
    except (arrow.ArrowException, OSError):
        return 1


def spread(units: Sequence[Unit], most: int) -> list[Unit]:
    """Evenly spaced units of together about `most` bytes; all, if there is no more."""
    total = sum(unit.size for unit in units)
    count = max(1, round(len(units) * most / total)) if total > most else len(units)
    return [units[len(units) * i // count] for i in range(count)]
