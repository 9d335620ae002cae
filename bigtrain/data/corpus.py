"""Read tokens from a prepared corpus, or from a plain Megatron one, as if they were one long array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.cached import Copies, default_folder, is_url
from bigtrain.data.manifest import NAME, TOKENIZER, Split, read_manifest
from bigtrain.data.shards import altered, read_index
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.errors import UserError

_OPEN = 256
"""Shards mapped at once: each holds a file descriptor, and 1024 is a usual limit."""
_AGAIN = "copy the file again from its source, or prepare the corpus again"


@dataclass(frozen=True)
class _Part:
    """One `.bin` of a corpus."""

    path: Path
    dtype: str
    tokens: int
    masked: bool = False
    """There is a `.mask` beside it."""


class Corpus:
    """The tokens of one split: `num_tokens` ids, read by position. Safe to read from several threads."""

    def __init__(
        self,
        parts: Sequence[_Part],
        tokenizer: Tokenizer,
        manifest_hash: str,
        *,
        text_bytes: int,
        longest: int,
        where: str,
        folder: Path | None = None,
        split: Split = "train",
        copies: Copies | None = None,
    ) -> None:
        """Use `Corpus.open`."""
        self.copies = copies
        """Of a corpus in a store."""
        self.where = where
        self.folder = folder
        """Of a corpus that `bigtrain prepare` wrote; None of a Megatron one."""
        self.split = split
        self.tokenizer_path = tokenizer.path
        self.tokenizer_sha256 = tokenizer.sha256
        self.vocab_size = tokenizer.vocab_size
        self.bos_id = tokenizer.bos_id
        self.eos_id = tokenizer.eos_id
        self.manifest_hash = manifest_hash
        self.text_bytes = text_bytes
        """UTF-8 bytes of the text behind the tokens; 0 if unknown (plain Megatron corpus)."""
        self.longest = longest
        """Tokens of the longest document."""
        self.masked = any(part.masked for part in parts)
        """Whether some tokens are no targets: a corpus of conversations."""
        self._parts = parts
        self._starts = np.cumsum([0, *(part.tokens for part in parts)])
        self.num_tokens = int(self._starts[-1])
        self._map = lru_cache(_OPEN)(self._mapped)

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: Split = "train",
        *,
        tokenizer: str | Path | None = None,
        cache: str | Path | None = None,
    ) -> Corpus:
        """Open a folder written by `bigtrain prepare`, or PREFIX of a Megatron PREFIX.bin + PREFIX.idx.

        The folder may be a URL; its files are copied into `cache` (default: cached.default_folder) as they are read.

        A Megatron corpus has no splits and no tokenizer of its own: `tokenizer` names its .model file.
        Checked before anything is read: sizes of all shards, dtype, largest id, the tokenizer's sha256.
        UserError names the file that is missing, truncated or does not belong.
        """
        if is_url(path):
            copies = Copies(str(path), Path(cache) if cache else default_folder(), (NAME, TOKENIZER))
            return cls._open_folder(copies.folder, split, copies)
        folder = Path(path)
        prefix = folder.with_name(folder.name.removesuffix(".bin").removesuffix(".idx"))
        if not folder.is_dir() and prefix.with_name(prefix.name + ".idx").exists():
            return cls._open_megatron(prefix, split, tokenizer)
        return cls._open_folder(folder, split)

    @classmethod
    def _open_folder(cls, folder: Path, split: Split, copies: Copies | None = None) -> Corpus:
        manifest = read_manifest(folder)
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        if tokenizer.sha256 != manifest.tokenizer["sha256"]:
            raise UserError(
                f"is not the tokenizer that {folder / NAME} was made with "
                f"(sha256 {tokenizer.sha256[:12]}..., expected {manifest.tokenizer['sha256'][:12]}...)",
                where=str(tokenizer.path),
                do="put the right tokenizer.model back, or prepare the corpus again with this one",
            )
        shards = manifest.splits.get(split, ())
        if copies is not None:
            copies.expect(list(shards))
        for shard in shards:
            file = folder / f"{shard.name}.bin"
            # Windows need no index, so one that is lost stops nobody who trains.
            for suffix in (s for s in shard.files if s != ".idx" and copies is None):
                _check_size(folder / f"{shard.name}{suffix}", shard.files[suffix])
            if shard.max_id >= tokenizer.vocab_size or shard.bin_bytes != shard.tokens * _width(shard.dtype):
                raise UserError(
                    f"holds ids up to {shard.max_id} in {shard.dtype}, which does not fit its tokenizer of "
                    f"{tokenizer.vocab_size} pieces",
                    where=str(file),
                    do=_AGAIN,
                )
        return cls(
            [_Part(folder / f"{s.name}.bin", s.dtype, s.tokens, s.mask_crc32 is not None) for s in shards],
            tokenizer,
            manifest.digest,
            text_bytes=sum(s.text_bytes for s in shards),
            longest=max((s.longest for s in shards), default=0),
            where=f"{folder if copies is None else copies.url} ({split})",
            folder=folder,
            split=split,
            copies=copies,
        )

    @classmethod
    def _open_megatron(cls, prefix: Path, split: Split, tokenizer: str | Path | None) -> Corpus:
        if tokenizer is None:
            raise UserError(
                "a Megatron corpus does not say which tokenizer made it",
                where=str(prefix),
                do="give its SentencePiece .model file",
            )
        if split != "train":
            raise UserError(
                f"a Megatron corpus has no {split} split",
                where=str(prefix),
                do="name its prefix for train only",
            )
        index_file = prefix.with_name(prefix.name + ".idx")
        index = read_index(index_file)
        tokens = int(index.lengths.sum(dtype=np.int64))
        file = prefix.with_name(prefix.name + ".bin")
        _check_size(file, tokens * _width(index.dtype))
        digest = hashlib.sha256(index_file.read_bytes()).hexdigest()
        return cls(
            [_Part(file, index.dtype, tokens)],
            Tokenizer.load(tokenizer),
            digest,
            text_bytes=0,
            longest=int(index.lengths.max(initial=0)),
            where=str(prefix),
        )

    def read(self, start: int, count: int) -> np.ndarray[Any, Any]:
        """Ids at positions start .. start + count - 1, int64 (count,), across shard borders.

        UserError if an id is outside the vocabulary: the shard was altered after it was written.
        """
        assert 0 <= start <= start + count <= self.num_tokens, (start, count, self.num_tokens)
        out = np.zeros(count, np.int64)
        for done, number, offset, size in self._stretches(start, count):
            piece = self._map(number, ".bin")[offset : offset + size]
            out[done : done + size] = piece
            # In the stored dtype: a quarter of the bytes, and unsigned ids cannot be negative.
            if piece.max() >= self.vocab_size or (piece.dtype.kind == "i" and piece.min() < 0):
                bad = out[(out >= self.vocab_size) | (out < 0)][0]
                raise UserError(
                    f"token id {bad} is not in the vocabulary of {self.vocab_size}: the shard was altered, "
                    "or another tokenizer made it",
                    where=str(self._parts[number].path),
                    do="run `bigtrain inspect --verify` on the corpus, or give the right tokenizer",
                )
        return out

    def locate(self, position: int) -> tuple[Path, int, int]:
        """The `.bin` that holds a token, the token's number in it, and how many there are in it."""
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        return self._parts[number].path, position - int(self._starts[number]), self._parts[number].tokens

    def read_mask(self, start: int, count: int) -> np.ndarray[Any, Any]:
        """Which of the tokens start .. start + count - 1 are targets, bool (count,)."""
        out = np.ones(count, bool)
        for done, number, offset, size in self._stretches(start, count):
            if self._parts[number].masked:
                first, last = offset // 8, (offset + size + 7) // 8
                bits = np.unpackbits(self._map(number, ".mask")[first:last], bitorder="little")
                out[done : done + size] = bits[offset % 8 : offset % 8 + size]
        return out

    def local(self, file: Path) -> Path:
        """A file beside the shards, which is copied first if the corpus lies in a store."""
        return file if self.copies is None else self.copies.local(file)

    def _stretches(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Tokens as stretches inside shards: (tokens before it, shard, first token in the shard, tokens)."""
        done = 0
        number = int(np.searchsorted(self._starts, start, "right")) - 1
        while done < count:
            offset = start + done - int(self._starts[number])
            size = min(count - done, self._parts[number].tokens - offset)
            if size:  # a shard may be empty
                yield done, number, offset, size
            done += size
            number += 1

    def _mapped(self, number: int, suffix: str) -> np.ndarray[Any, Any]:
        part = self._parts[number]
        dtype = np.dtype(part.dtype if suffix == ".bin" else np.uint8)
        file = part.path.with_name(part.path.name.removesuffix(".bin") + suffix)
        try:
            # As a plain array: slices of a memmap are made twice as slowly.
            return (
                np.memmap(self.local(file), dtype, "r").view(np.ndarray)
                if part.tokens
                else np.empty(0, dtype)
            )
        except OSError as error:
            raise UserError("cannot open the shard", where=str(file), do=_AGAIN) from error


def _width(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def _check_size(file: Path, expected: int) -> None:
    """UserError if a shard is missing or has another size than was written."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise UserError("the shard is missing", where=str(file), do=_AGAIN) from error
    if size != expected:
        state = "truncated" if size < expected else "longer than it was written"
        raise UserError(f"has {size} bytes, expected {expected}: {state}", where=str(file), do=_AGAIN)


def verify(path: str | Path) -> int:
    """Read every shard of a prepared folder again and compare checksums; returns the bytes read.

    UserError names the first altered file and the 64 MiB block in it.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    total = 0
    for split, shards in manifest.splits.items():
        Corpus.open(folder, split)  # type: ignore[arg-type]  # names come from the manifest
        for shard in shards:
            for suffix in shard.files:
                file = folder / f"{shard.name}{suffix}"
                _check_size(file, shard.files[suffix])
                if problem := altered(shard, suffix, file):
                    raise UserError(problem, where=str(file), do=_AGAIN)
            index = folder / f"{shard.name}.idx"
            if int(read_index(index).lengths.sum(dtype=np.int64)) != shard.tokens:
                raise UserError("was altered: its checksum differs", where=str(index), do=_AGAIN)
            total += sum(shard.files.values())
    return total
