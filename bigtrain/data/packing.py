"""Best-fit packing: documents put together into sequences so that only those longer than a sequence are cut.

Best-fit-decreasing bin packing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830):
the longest document first, each into the fullest sequence that still has room for it. Per shard, from its index alone,
so shards are packed in parallel; `<shard>.pack4096` holds the result and `pack4096.json` makes it complete.
"""

from __future__ import annotations

import heapq
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.files import write_whole
from bigtrain.data.manifest import Manifest, Split, read_manifest
from bigtrain.data.order import Ints
from bigtrain.data.shards import read_index
from bigtrain.errors import UserError

_MAGIC = b"BTPACK1\0"
_HEADER = struct.Struct("<8sIIQQ")
"""Magic, tokens of a sequence, CRC-32 of the `.idx`, sequences, parts. Then int64 (sequences + 1) borders among the
parts, int64 (parts) first tokens in the shard, int32 (parts) sizes."""
_OPEN = 256
"""Files mapped at once: each holds a file descriptor."""


@dataclass(frozen=True)
class Packed:
    """A shard's sequences. Sequence i is made of the parts borders[i] .. borders[i + 1] - 1."""

    borders: Ints
    """(sequences + 1,)"""
    starts: Ints
    """(parts,) first token, counted in the shard."""
    sizes: Ints
    """(parts,) tokens."""


@dataclass(frozen=True)
class PackInfo:
    """One packed shard, as `pack4096.json` lists it."""

    shard: str
    sequences: int
    parts: int
    tokens: int
    documents: int
    cut: int
    """Documents longer than a sequence."""
    idx_crc32: int


def pack(lengths: Ints, size: int) -> Packed:
    """Pack documents of `lengths` (documents,) tokens, which lie one after another, into sequences of `size` tokens.

    A document that is longer is cut into whole sequences, one after another, and the rest begins the sequence behind
    them. Then come the other documents, the longest first (of equal ones the first first), each into the sequence with
    the least room that is enough, of several the first, or into a new one.
    """
    sequences: list[list[tuple[int, int]]] = []
    room = _Rooms(size)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    for number in np.flatnonzero(lengths > size).tolist():
        start, left = int(starts[number]), int(lengths[number])
        while left > 0:
            part = min(size, left)
            room.put(len(sequences), size - part)
            sequences.append([(start, part)])
            start, left = start + part, left - part
    fitting = np.flatnonzero((lengths <= size) & (lengths > 0))
    for number in fitting[np.argsort(-lengths[fitting], kind="stable")].tolist():
        length = int(lengths[number])
        found = room.take(length)
        if found is None:
            found = len(sequences), size
            sequences.append([])
        sequences[found[0]].append((int(starts[number]), length))
        room.put(found[0], found[1] - length)
    parts = np.array([part for sequence in sequences for part in sequence], np.int64).reshape(-1, 2)
    borders = np.cumsum([0, *map(len, sequences)])
    return Packed(borders.astype(np.int64), parts[:, 0], parts[:, 1])


class _Rooms:
    """Sequences by the room that they have left."""

    def __init__(self, size: int) -> None:
        self._by_room: list[list[int]] = [[] for _ in range(size + 1)]
        self._some = 0  # bit r: there is a sequence with room for r tokens

    def put(self, sequence: int, room: int) -> None:
        if room > 0:
            heapq.heappush(self._by_room[room], sequence)
            self._some |= 1 << room

    def take(self, length: int) -> tuple[int, int] | None:
        """The first sequence with the least room that is enough, and that room."""
        enough = self._some >> length
        if not enough:
            return None
        room = length + (enough & -enough).bit_length() - 1
        sequence = heapq.heappop(self._by_room[room])
        if not self._by_room[room]:
            self._some &= ~(1 << room)
        return sequence, room


def pack_shard(folder: Path, shard: str, size: int) -> PackInfo:
    """Write `<shard>.pack<size>`, or keep the one that is there and right. UserError for a damaged index."""
    index_file, file = folder / f"{shard}.idx", folder / f"{shard}.pack{size}"
    index = read_index(index_file)
    crc = zlib.crc32(index_file.read_bytes())
    ends = np.concatenate([[0], np.cumsum(index.lengths, dtype=np.int64)])[index.borders]
    lengths = np.diff(ends)
    try:
        packed = _read(file, size, crc)
    except UserError:
        packed = pack(lengths, size)
        header = _HEADER.pack(_MAGIC, size, crc, len(packed.borders) - 1, len(packed.starts))
        arrays = packed.borders.astype("<i8"), packed.starts.astype("<i8"), packed.sizes.astype("<i4")
        write_whole(file, b"".join([header, *(array.tobytes() for array in arrays)]))
    return PackInfo(
        shard,
        sequences=len(packed.borders) - 1,
        parts=len(packed.starts),
        tokens=int(ends[-1]),
        documents=len(lengths),
        cut=int((lengths > size).sum()),
        idx_crc32=crc,
    )


def _read(file: Path, size: int, idx_crc32: int) -> Packed:
    """Map a packed shard. UserError if it is missing, damaged or of another shard."""
    try:
        data = np.memmap(file, np.uint8, "r")
        magic, tokens, crc, sequences, parts = _HEADER.unpack(data[: _HEADER.size].tobytes())
    except (OSError, ValueError, struct.error) as e:
        raise UserError(f"cannot be read as a packed shard ({e})", where=str(file), do=_advice(size)) from e
    expected = _HEADER.size + 8 * (sequences + 1) + 12 * parts
    if (magic, tokens, crc, len(data)) != (_MAGIC, size, idx_crc32, expected):
        raise UserError("is damaged, or was packed from another shard", where=str(file), do=_advice(size))
    first, second = _HEADER.size + 8 * (sequences + 1), _HEADER.size + 8 * (sequences + 1 + parts)
    return Packed(
        data[_HEADER.size : first].view("<i8"), data[first:second].view("<i8"), data[second:].view("<i4")
    )


def _advice(size: int, folder: str = "CORPUS") -> str:
    return f"run `bigtrain pack {folder} --sequence-length {size}`"


def manifest_file(folder: Path, size: int) -> Path:
    """The file that makes a packing complete."""
    return folder / f"pack{size}.json"


def pack_corpus(
    folder: Path, size: int, *, workers: int = 1, tell: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, list[PackInfo]]:
    """Pack all shards of a prepared corpus; `tell` hears how many are done.

    The result does not depend on the workers; interrupted, the same call goes on with what is not done. UserError: not
    a corpus, a damaged index, a size below 2. RunError: the disk is full.
    """
    if size < 2:
        raise UserError(f"{size} tokens are no sequence", where="--sequence-length", do="give 2 or more")
    manifest = read_manifest(folder)
    names = [(split, shard.name) for split, shards in manifest.splits.items() for shard in shards]
    found: dict[str, list[PackInfo]] = {split: [] for split in manifest.splits}
    for done, ((split, _), info) in enumerate(
        zip(names, _packed(folder, size, names, workers), strict=True), 1
    ):
        found[split].append(info)
        tell(done, len(names))
    content = {
        "format": "bigtrain packing 1",
        "sequence_length": size,
        "digest": _digest(manifest),
        "splits": {split: [asdict(info) for info in infos] for split, infos in found.items()},
    }
    write_whole(manifest_file(folder, size), json.dumps(content, indent=1).encode())
    return found


def _packed(folder: Path, size: int, names: Sequence[tuple[str, str]], workers: int) -> Iterator[PackInfo]:
    if min(workers, len(names)) < 2:
        yield from (pack_shard(folder, name, size) for _, name in names)
        return
    with ProcessPoolExecutor(min(workers, len(names)), get_context("spawn")) as pool:
        count = len(names)
        yield from pool.map(pack_shard, [folder] * count, [name for _, name in names], [size] * count)


def _digest(manifest: Manifest) -> dict[str, Any]:
    """What a packing was made from."""
    return {
        split: [[s.name, s.idx_crc32, s.tokens] for s in shards] for split, shards in manifest.splits.items()
    }


class Packs:
    """The packed sequences of one split, read by number. Safe to read from several threads."""

    def __init__(
        self, folder: Path, size: int, infos: Sequence[PackInfo], local: Callable[[Path], Path]
    ) -> None:
        """Use `Packs.open`."""
        self._local = local
        self._folder, self._size, self._infos = folder, size, infos
        self._starts = np.cumsum([0, *(info.sequences for info in infos)])
        self._tokens = np.cumsum([0, *(info.tokens for info in infos)])
        self.count = int(self._starts[-1])
        """Sequences."""
        self.padding = 1 - int(self._tokens[-1]) / max(1, self.count * size)
        """Share of their tokens that is padding."""
        self._map = lru_cache(_OPEN)(self._mapped)

    @staticmethod
    def open(
        folder: Path, split: Split, size: int, local: Callable[[Path], Path] = lambda file: file
    ) -> Packs:
        """Read pack<size>.json; `local` makes a file ready to be read (Corpus.local).

        UserError if the corpus has not been packed so, or was prepared again since.
        """
        file = manifest_file(folder, size)
        try:
            content = json.loads(local(file).read_bytes())
            made_from, infos = content["digest"], [PackInfo(**info) for info in content["splits"][split]]
        except FileNotFoundError as e:
            what = f"is not packed into sequences of {size} tokens"
            raise UserError(what, where=str(folder), do=_advice(size, str(folder))) from e
        except (OSError, ValueError, KeyError, TypeError) as e:
            what = f"cannot be read as a packing ({e})"
            raise UserError(what, where=str(file), do=_advice(size, str(folder))) from e
        if made_from != _digest(read_manifest(folder)):
            raise UserError("was packed from another corpus", where=str(file), do=_advice(size, str(folder)))
        return Packs(folder, size, infos, local)

    def parts(self, sequence: int) -> list[tuple[int, int]]:
        """First token, counted in the split as Corpus.read does, and size of each part of a sequence."""
        number = int(np.searchsorted(self._starts, sequence, "right")) - 1
        packed, inside = self._map(number), sequence - int(self._starts[number])
        mine = slice(int(packed.borders[inside]), int(packed.borders[inside + 1]))
        starts = packed.starts[mine] + int(self._tokens[number])
        return list(zip(starts.tolist(), packed.sizes[mine].tolist(), strict=True))

    def _mapped(self, number: int) -> Packed:
        info = self._infos[number]
        file = self._folder / f"{info.shard}.pack{self._size}"
        return _read(self._local(file), self._size, info.idx_crc32)
