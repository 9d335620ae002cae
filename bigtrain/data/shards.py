"""Write token shards: Megatron's `.bin` + `.idx`, and beside them a JSON sidecar with what that format lacks.

`.bin` is the token ids one after another. `.idx` (little-endian): magic "MMIDIDX" and two zero bytes, u64
version 1, u8 dtype code, u64 sequences n, u64 document borders m, i32 length of each sequence, i64 byte
position of each, i64 document borders (m sequence numbers from 0 to n). Megatron-LM, NeMo and gpt-neox read
it (megatron/core/datasets/indexed_dataset.py).
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from array import array
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain import __version__
from bigtrain.data.files import commit, disk_errors, temporary, write_whole
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODES = {name: code for code, name in DTYPES.items()}
BLOCK = 64 * 2**20
"""Bytes of `.bin` under one CRC-32, so that an altered byte is found to within 64 MiB."""
MAX_SEQUENCE = 2**31 - 1
"""Sequence lengths are i32: a longer document is stored as several sequences of one document."""


def token_dtype(vocab_size: int) -> str:
    """uint16 where every id fits (Megatron's limit is 65,499 too), else int32."""
    return "uint16" if vocab_size < 65500 else "int32"


@dataclass(frozen=True)
class ShardInfo:
    """One finished shard; the same fields stand in its sidecar and in dataset.json."""

    name: str
    """`.bin`, `.idx` and `.json` lie beside dataset.json under this name."""
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text that the tokens stand for."""
    max_id: int
    """Largest token id; -1 in a shard without tokens."""
    longest: int
    """Tokens of the longest document, BOS and EOS included."""
    bin_bytes: int
    crc32: tuple[int, ...]
    """CRC-32 of each BLOCK bytes of `.bin`."""
    idx_bytes: int
    idx_crc32: int
    first_source: str
    """Where the first and the last document came from."""
    last_source: str
    mask_crc32: int | None = None
    """CRC-32 of `.mask`: a bit a token (the first token's the lowest), whether the token is a target. None: all are."""

    @property
    def files(self) -> dict[str, int]:
        """Bytes of its data files, by suffix."""
        found = {".bin": self.bin_bytes, ".idx": self.idx_bytes}
        return found if self.mask_crc32 is None else {**found, ".mask": mask_bytes(self.tokens)}


def altered(info: ShardInfo, suffix: str, file: Path) -> str:
    """What differs from what was written in a data file (`.bin`, `.idx`, `.mask`) of a shard; "" if nothing does."""
    with open(file, "rb") as stream:
        if suffix != ".bin":
            wanted = info.idx_crc32 if suffix == ".idx" else info.mask_crc32
            return "" if zlib.crc32(stream.read()) == wanted else "was altered: its checksum differs"
        for block, crc in enumerate(info.crc32):
            if zlib.crc32(stream.read(BLOCK)) != crc:
                first, last = block * BLOCK, min((block + 1) * BLOCK, info.bin_bytes) - 1
                return f"block {block} (bytes {first} to {last}) was altered: its checksum differs"
    return ""


def mask_bytes(tokens: int) -> int:
    """Size of a `.mask`."""
    return -(-tokens // 8)


class ShardWriter:
    """Writes one shard. Nothing carries its final name before `close` has written everything to the disk."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer, *, max_sequence: int = MAX_SEQUENCE) -> None:
        """`prefix` is the path without ".bin". RunError if the disk is full, here or in any other call."""
        self.prefix = prefix
        self.tokens = 0
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        self._max_sequence = max_sequence
        self._lengths = array("i")
        self._borders = array("q", [0])
        self._crc: list[int] = []
        self._block = 0  # bytes in the last block
        self._max_id = -1
        self._longest = 0
        self._text_bytes = 0
        self._sources: tuple[str, str] = ("", "")
        self._mask: bytearray | None = None
        self._mask_rest = np.empty(0, bool)  # tokens that do not fill a byte yet
        self._bin = prefix.with_name(prefix.name + ".bin")
        with disk_errors(self._bin):
            self._file = open(temporary(self._bin), "wb", buffering=2**20)  # noqa: SIM115 - closed in close()

    def add(
        self,
        tokens: np.ndarray[Any, Any],
        *,
        text_bytes: int,
        source: str,
        mask: np.ndarray[Any, Any] | None = None,
    ) -> None:
        """Append one document: its ids (n,) with BOS and EOS, the bytes of its text, where it came from.

        `mask`, bool (n,): which tokens are targets; the documents of a shard all have one or none has.
        """
        if mask is not None:
            assert len(mask) == len(tokens)
            known = np.concatenate([self._mask_rest, mask.astype(bool)])
            whole = len(known) // 8 * 8
            self._mask = self._mask if self._mask is not None else bytearray()
            self._mask += np.packbits(known[:whole], bitorder="little").tobytes()
            self._mask_rest = known[whole:]
        data = memoryview(np.ascontiguousarray(tokens, self._dtype).tobytes())
        with disk_errors(self._bin):
            self._file.write(data)
        self._checksum(data)
        for start in range(0, len(tokens), self._max_sequence):
            self._lengths.append(min(self._max_sequence, len(tokens) - start))
        self._borders.append(len(self._lengths))
        self.tokens += len(tokens)
        self._text_bytes += text_bytes
        self._max_id = max(self._max_id, int(tokens.max(initial=-1)))
        self._longest = max(self._longest, len(tokens))
        self._sources = (self._sources[0] or source, source)

    def _checksum(self, data: memoryview) -> None:
        while len(data):
            if self._block == 0:
                self._crc.append(0)
            part = data[: BLOCK - self._block]
            self._crc[-1] = zlib.crc32(part, self._crc[-1])
            self._block = (self._block + len(part)) % BLOCK
            data = data[len(part) :]

    def close(self) -> ShardInfo:
        """Finish `.bin`, `.idx` and, last, the sidecar."""
        with disk_errors(self._bin):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            commit(self._bin)
        index = index_bytes(self._dtype.name, np.array(self._lengths), np.array(self._borders))
        write_whole(self.prefix.with_name(self.prefix.name + ".idx"), index)
        mask_crc = None
        if self._mask is not None:
            bits = bytes(self._mask) + np.packbits(self._mask_rest, bitorder="little").tobytes()
            assert len(bits) == mask_bytes(self.tokens), "every document has a mask, or none has"
            write_whole(self.prefix.with_name(self.prefix.name + ".mask"), bits)
            mask_crc = zlib.crc32(bits)
        info = ShardInfo(
            name=self.prefix.name,
            dtype=self._dtype.name,
            tokens=self.tokens,
            documents=len(self._borders) - 1,
            text_bytes=self._text_bytes,
            max_id=self._max_id,
            longest=self._longest,
            bin_bytes=self.tokens * self._dtype.itemsize,
            crc32=tuple(self._crc),
            idx_bytes=len(index),
            idx_crc32=zlib.crc32(index),
            first_source=self._sources[0],
            last_source=self._sources[1],
            mask_crc32=mask_crc,
        )
        sidecar = {"tool": f"bigtrain {__version__}", "tokenizer": tokenizer_facts(self._tokenizer)}
        text = json.dumps({**sidecar, **asdict(info)}, indent=1, ensure_ascii=False)
        write_whole(self.prefix.with_name(self.prefix.name + ".json"), text.encode())
        return info

    def abort(self) -> None:
        """Give up: remove the temporary file."""
        with suppress(OSError):  # a full disk refuses the last flush too
            self._file.close()
        temporary(self._bin).unlink(missing_ok=True)


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What must be known of a tokenizer to use its tokens."""
    return {
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "document": "[BOS] text [EOS]" if tokenizer.bos_id >= 0 else "text [EOS]",
    }


def index_bytes(dtype: str, lengths: np.ndarray[Any, Any], borders: np.ndarray[Any, Any]) -> bytes:
    """The content of an `.idx`: sequence lengths in tokens, and document borders as sequence numbers."""
    sizes = lengths.astype(np.int64) * np.dtype(dtype).itemsize
    pointers = np.zeros(len(sizes), np.int64)
    np.cumsum(sizes[:-1], out=pointers[1:])
    header = HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(borders))
    arrays = lengths.astype("<i4"), pointers.astype("<i8"), borders.astype("<i8")
    return b"".join([header, *(a.tobytes() for a in arrays)])


@dataclass(frozen=True)
class Index:
    """An `.idx` read back."""

    dtype: str
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    """(sequences,) tokens."""
    borders: np.ndarray[Any, np.dtype[np.int64]]
    """(documents + 1,) sequence numbers."""


def read_index(path: Path) -> Index:
    """Read and check an `.idx`. UserError if it is none, cut off, or does not describe a gapless `.bin`."""
    advice = "prepare the corpus again, or copy this file from its source"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError("cannot read the index", where=str(path), do="check the path") from error
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise UserError("not a Megatron index (it must start with MMIDIDX)", where=str(path), do=advice)
    _, version, code, sequences, borders = HEADER.unpack_from(data)
    if version != 1 or code not in DTYPES:
        raise UserError(f"unknown version {version} or dtype code {code}", where=str(path), do=advice)
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(data) != expected:
        raise UserError(f"has {len(data)} bytes, expected {expected}: truncated", where=str(path), do=advice)
    lengths = np.frombuffer(data, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(data, "<i8", sequences, HEADER.size + 4 * sequences)
    ends = np.cumsum(lengths.astype(np.int64) * np.dtype(DTYPES[code]).itemsize)
    if sequences and (pointers[0] != 0 or not np.array_equal(pointers[1:], ends[:-1])):
        raise UserError("sequences are not stored one after another", where=str(path), do=advice)
    return Index(DTYPES[code], lengths, np.frombuffer(data, "<i8", borders, HEADER.size + 12 * sequences))
