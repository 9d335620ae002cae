"""Documents to framed token ids to shards, in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from bigtrain.data.documents import Document
from bigtrain.data.manifest import Split
from bigtrain.data.shards import ShardInfo, ShardWriter
from bigtrain.data.tokenizer import Tokenizer, Tokens

_BATCH = 2**20
"""Characters handed to the encoder at once; it spreads them over the cores."""


def encoded(
    documents: Iterable[tuple[Split, Document]], tokenizer: Tokenizer, threads: int = -1
) -> Iterator[tuple[Split, Document, Tokens]]:
    """Each document with its ids, int32, framed by BOS (if the tokenizer has one) and EOS.

    `threads`: of the encoder, -1 for one a core; the ids do not depend on it.
    """
    begin = np.array([tokenizer.bos_id] if tokenizer.bos_id >= 0 else [], np.int32)
    end = np.array([tokenizer.eos_id], np.int32)
    batch: list[tuple[Split, Document]] = []
    size = 0

    def flush() -> Iterator[tuple[Split, Document, Tokens]]:
        ids = tokenizer.encode_batch([document.text for _, document in batch], threads=threads)
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

    def __init__(
        self, folder: Path, name: Callable[[int], str], tokenizer: Tokenizer, shard_tokens: int
    ) -> None:
        """`name` of the n-th shard."""
        self.tokens = 0
        self._folder, self._name, self._tokenizer, self._limit = folder, name, tokenizer, shard_tokens
        self._done: list[ShardInfo] = []
        self._writer: ShardWriter | None = None

    def add(self, tokens: Tokens, *, text_bytes: int, source: str) -> None:
        """Store one document, whole in one shard."""
        if self._writer is None:
            self._writer = ShardWriter(self._folder / self._name(len(self._done)), self._tokenizer)
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
