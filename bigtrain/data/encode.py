"""Documents to framed token ids to shards, in a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bigtrain.data.documents import Document
from bigtrain.data.manifest import Split
from bigtrain.data.shards import ShardInfo, ShardWriter
from bigtrain.data.tokenizer import Tokenizer, Tokens

_BATCH = 2**20
"""Characters handed to the encoder at once; it spreads them over the cores."""


def encoded(
    documents: Iterable[tuple[Split, Document]], tokenizer: Tokenizer
) -> Iterator[tuple[Split, Document, Tokens]]:
    """Each document with its ids, int32, framed by BOS (if the tokenizer has one) and EOS."""
    begin = np.array([tokenizer.bos_id] if tokenizer.bos_id >= 0 else [], np.int32)
    end = np.array([tokenizer.eos_id], np.int32)
    batch: list[tuple[Split, Document]] = []
    size = 0

    def flush() -> Iterator[tuple[Split, Document, Tokens]]:
        ids = tokenizer.encode_batch([document.text for _, document in batch])
        for (split, document), body in zip(batch, ids, strict=True):
            yield split, document, np.concatenate([begin, body, end])
        batch.clear()

    for pair in documents:
        batch.append(pair)
        size += len(pair[1].text)
        if size >= _BATCH:
            yield from flush()
            size = 0
    yield from flush()


class ShardSet:
    """The shards of one split, begun when needed and closed when full."""

    def __init__(self, folder: Path, split: Split, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.tokens = 0
        self._folder, self._split, self._tokenizer, self._limit = folder, split, tokenizer, shard_tokens
        self._done: list[ShardInfo] = []
        self._writer: ShardWriter | None = None

    def add(self, tokens: Tokens, *, text_bytes: int, source: str) -> None:
        """Store one document, whole in one shard."""
        if self._writer is None:
            name = f"{self._split}-{len(self._done):05d}"
            self._writer = ShardWriter(self._folder / name, self._tokenizer)
        self._writer.add(tokens, text_bytes=text_bytes, source=source)
        self.tokens += len(tokens)
        if self._writer.tokens >= self._limit:
            self.finish()

    def finish(self) -> list[ShardInfo]:
        """Close the shard being written; all shards so far."""
        if self._writer is not None:
            self._done.append(self._writer.close())
            self._writer = None
        return self._done

    def abort(self) -> None:
        """Drop the shard being written; nothing if `finish` was called."""
        if self._writer is not None:
            self._writer.abort()
            self._writer = None
