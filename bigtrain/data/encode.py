"""Documents to framed token ids to shards, in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigtrain.data.documents import Document
from bigtrain.data.manifest import Split
from bigtrain.data.shards import ShardInfo, ShardWriter
from bigtrain.data.tokenizer import Tokenizer, Tokens

_BATCH = 2**20
"""Characters handed to the encoder at once; it spreads them over the cores."""


Mask = np.ndarray[Any, np.dtype[np.bool_]]


class Encoded(NamedTuple):
    """A document as tokens."""

    split: Split
    document: Document
    tokens: Tokens
    """int32 (n,), framed by BOS (if the tokenizer has one) and EOS."""
    mask: Mask | None
    """(n,) Which tokens are learned: of a conversation, those of the responses, and EOS behind a response."""


def encoded(
    documents: Iterable[tuple[Split, Document]],
    tokenizer: Tokenizer,
    threads: int = -1,
    *,
    masks: bool = False,
) -> Iterator[Encoded]:
    """Each document with its ids, and with its mask if `masks`. The parts of a conversation are encoded by themselves.

    `threads`: of the encoder, -1 for one a core; the ids do not depend on it.
    """
    begin = np.array([tokenizer.bos_id] if tokenizer.bos_id >= 0 else [], np.int32)
    end = np.array([tokenizer.eos_id], np.int32)
    batch: list[tuple[Split, Document]] = []
    size = 0

    def flush() -> Iterator[Encoded]:
        parts = [document.segments or ((document.text, True),) for _, document in batch]
        ids = iter(tokenizer.encode_batch([text for of_one in parts for text, _ in of_one], threads=threads))
        for (split, document), of_one in zip(batch, parts, strict=True):
            bodies = [next(ids) for _ in of_one]
            mask = None
            if masks:
                counts = [not document.segments, *(learned for _, learned in of_one), of_one[-1][1]]
                mask = np.repeat(counts, [len(begin), *map(len, bodies), len(end)])
            yield Encoded(split, document, np.concatenate([begin, *bodies, end]), mask)
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

    def add(
        self, tokens: Tokens, *, text_bytes: int, source: str, mask: np.ndarray[Any, Any] | None = None
    ) -> None:
        """Store one document, whole in one shard (see ShardWriter.add)."""
        if self._writer is None:
            self._writer = ShardWriter(self._folder / self._name(len(self._done)), self._tokenizer)
        self._writer.add(tokens, text_bytes=text_bytes, source=source, mask=mask)
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
