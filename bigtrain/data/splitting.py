"""Which documents are held out, and in which order they are stored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator

from bigtrain.data.documents import Document
from bigtrain.data.manifest import Split


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b over the UTF-8 text: decides things about a document whatever its place."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def by_hash(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Split, Document]]:
    """Each document with its split, by the hash of its text alone."""
    border = int(fraction * 2**64)
    for document in documents:
        yield _side(text_hash(document.text), border), document


def split_documents(documents: Iterable[Document], fraction: float) -> Iterator[tuple[Split, Document]]:
    """As by_hash: `validation` if the hash of a text is among the lowest `fraction`.

    So a text's split depends neither on the order nor on the other texts, and copies of a text stay together.
    Two documents or more give at least one in each split (if 0 < fraction < 1): as long as all fall on one
    side, the nearest to the other side is kept back, and changes sides if nothing else comes.
    """
    border = int(fraction * 2**64)
    kept: tuple[int, Document] | None = None
    seen: set[Split] = set()
    count = 0
    for document in documents:
        count += 1
        number = text_hash(document.text)
        split: Split = "validation" if number < border else "train"
        seen.add(split)
        if fraction == 0 or len(seen) == 2:
            if kept is not None:
                yield _side(kept[0], border), kept[1]
                kept = None
            yield split, document
        elif kept is None:
            kept = (number, document)
        else:
            nearer = number < kept[0] if split == "train" else number > kept[0]
            yield split, kept[1] if nearer else document
            kept = (number, document) if nearer else kept
    if kept is not None:
        yield "validation" if count > 1 and "train" in seen else "train", kept[1]


def _side(number: int, border: int) -> Split:
    return "validation" if number < border else "train"


def shuffled(documents: Iterable[Document], buffer: int, seed: int) -> Iterator[Document]:
    """The documents in another order, the same for the same seed.

    Holds up to `buffer` characters and gives out a random one of what it holds, so that neighbours in a file
    (windows of neighbouring tokens are read together) come apart.
    """
    choose = random.Random(seed)
    held: list[Document] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.text)
        while size > buffer:
            chosen = choose.randrange(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            given = held.pop()
            size -= len(given.text)
            yield given
    choose.shuffle(held)
    yield from held
