"""Which documents come again: the same text, or nearly the same. The first of all, in the order of the inputs, stays.

Every worker writes the signs of its units' documents; what is left out is decided from all of them, so that it depends
on neither who worked nor in which order. Memory to decide: about 40 bytes a document, and 500 on the disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.data.documents import Document, Report, read_documents
from bigtrain.data.files import disk_errors, write_whole
from bigtrain.data.minhash import Signatures, bands, bands_and_rows, signature
from bigtrain.data.order import Ints
from bigtrain.data.units import Unit
from bigtrain.data.work import Tell, Work
from bigtrain.errors import RunError

FOLDER = "duplicates"
"""Of the signs and the decisions, in the corpus folder, until the corpus is finished."""
_NAMED = 10
"""Documents for which the report names the one that stays: it shows no more examples."""


def _file(work: Work, number: int, what: str) -> Path:
    return work.out / FOLDER / f"{number:05d}.{what}"


def sign_unit(work: Work, unit: Unit, tell: Tell) -> int:
    """Write a unit's signs: digests of 128 bits, for near duplicates the signatures, and where the documents are.

    Returns how many documents there are.
    They are kept if they are there. UserError: see documents.read_documents. RunError: the disk is full.
    """
    mark = _file(work, unit.number, "json")
    if (known := _known(mark, work)) is not None:
        return int(known["documents"])
    report, last = Report(), 0.0
    digests, signatures, places = [], [], []
    size = np.prod(bands_and_rows(work.near), dtype=int) if work.near else 0
    for document in read_documents(unit.pieces, work.read, report):
        digests.append(hashlib.blake2b(document.text.encode(), digest_size=16).digest())
        if work.near:
            signatures.append(signature(document.text, size))
        places.append(document.source)
        if (now := time.monotonic()) - last > 0.2:
            last = now
            tell(report, 0)
    with disk_errors(mark):
        mark.parent.mkdir(exist_ok=True)
    write_whole(_file(work, unit.number, "digests"), b"".join(digests))
    write_whole(_file(work, unit.number, "signatures"), b"".join(s.tobytes() for s in signatures))
    write_whole(_file(work, unit.number, "places"), json.dumps(places, ensure_ascii=False).encode())
    write_whole(mark, json.dumps({"request": work.request, "documents": len(digests)}).encode())
    return len(digests)


def _known(file: Path, work: Work) -> dict[str, Any] | None:
    """What a file of this request says; None if it is another's or not there."""
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if content.get("request") == work.request else None


def decide(work: Work) -> None:
    """Write what each unit leaves out, from all units' signs. RunError if signs are missing, or the disk is full."""
    if all(_known(_file(work, n, "left_out"), work) for n in range(work.units)):
        return
    counts = []
    for number in range(work.units):
        mark = _known(_file(work, number, "json"), work)
        if mark is None:
            raise RunError(
                f"the signs of unit {number} are not there although a worker wrote them",
                where=str(_file(work, number, "json")),
                do="all ranks must see the same folder; run the same command again",
            )
        counts.append(mark["documents"])
    stays, same = first_of_each(_digests(work, counts))
    if work.near:
        stays = nearly(_Signatures(work, counts), stays, work.near)
    ends = np.cumsum([0, *counts])
    named = 0
    for number, (start, end) in enumerate(pairwise(ends)):
        named += _write_left_out(work, number, stays[start:end], same[start:end], ends, _NAMED - named)


def _digests(work: Work, counts: Sequence[int]) -> np.ndarray[Any, Any]:
    """(documents, 2) uint64"""
    found = np.empty((sum(counts), 2), np.uint64)
    done = 0
    for number, count in enumerate(counts):
        found[done : done + count] = np.fromfile(_file(work, number, "digests"), np.uint64).reshape(count, 2)
        done += count
    return found


def first_of_each(digests: np.ndarray[Any, Any]) -> tuple[Ints, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Of each document the first with the same digest (n, 2): int64 (n,), and bool (n,) whether that is another one."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first of equal ones stays first
    ordered = digests[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(1)
    stays = np.empty(len(order), np.int64)
    stays[order] = order[begins][np.cumsum(begins) - 1]
    return stays, stays != np.arange(len(order))


class _Signatures:
    """All units' signatures, mapped."""

    def __init__(self, work: Work, counts: Sequence[int]) -> None:
        self.size = int(np.prod(bands_and_rows(work.near), dtype=int))
        self._files = [
            np.memmap(_file(work, n, "signatures"), np.uint32, "r", shape=(count, self.size))
            if count
            else np.empty((0, self.size), np.uint32)
            for n, count in enumerate(counts)
        ]
        self._starts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def columns(self, columns: slice) -> Signatures:
        """Some numbers of every signature."""
        return np.concatenate([file[:, columns] for file in self._files])

    def rows(self, documents: Ints) -> Signatures:
        """The signatures of some documents (n,), uint32 (n, size)."""
        found = np.empty((len(documents), self.size), np.uint32)
        units = np.searchsorted(self._starts, documents, "right") - 1
        for unit in np.unique(units).tolist():
            mine = units == unit
            found[mine] = self._files[unit][documents[mine] - self._starts[unit]]
        return found


def nearly(signatures: Any, stays: Ints, threshold: float) -> Ints:
    """Of each document the first of those that hang together with it by near-equal pairs, int64 (n,).

    Compared are documents with an equal band: each with the first such, and with the one before. A pair counts if
    `threshold` of its signatures' numbers are equal. Documents of the same text (`stays`) hang together.
    """
    count, rows = bands_and_rows(threshold)
    root = stays.copy()
    alone = stays == np.arange(len(stays))
    for band in range(count):
        hashes = bands(signatures.columns(slice(band * rows, (band + 1) * rows)), 1, rows)[:, 0]
        order = np.argsort(hashes, kind="stable")
        order = order[alone[order]]
        begins = np.ones(len(order), bool)
        begins[1:] = hashes[order[1:]] != hashes[order[:-1]]
        first = order[begins][np.cumsum(begins) - 1]
        pairs = np.concatenate(
            [
                np.stack([first, order], 1)[~begins],
                np.stack([order[:-1], order[1:]], 1)[~begins[1:]],
            ]
        )
        for a, b in np.unique(similar(signatures, pairs, threshold), axis=0).tolist():
            low, high = sorted((_root(root, a), _root(root, b)))
            root[high] = low
    return np.array([_root(root, i) for i in range(len(root))], np.int64)


def _root(root: Ints, i: int) -> int:
    """The first document that i hangs together with so far; the way there is shortened."""
    while root[i] != i:
        root[i] = root[root[i]]
        i = int(root[i])
    return i


def similar(signatures: Any, pairs: Ints, threshold: float) -> Ints:
    """The pairs (n, 2) of documents with at least `threshold` of their signatures' numbers equal."""
    kept = [np.empty((0, 2), np.int64)]
    for start in range(0, len(pairs), 4096):
        part = pairs[start : start + 4096]
        equal = (signatures.rows(part[:, 0]) == signatures.rows(part[:, 1])).mean(1)
        kept.append(part[equal >= threshold])
    return np.concatenate(kept)


def _write_left_out(
    work: Work, number: int, stays: Ints, same: np.ndarray[Any, Any], ends: Ints, most: int
) -> int:
    """Write one unit's decision; for how many documents, `most` at most, it names the one that stays."""
    gone = np.flatnonzero(stays != np.arange(ends[number], ends[number] + len(stays)))
    named = {}
    for document in gone[:most].tolist():
        unit = int(np.searchsorted(ends, stays[document], "right")) - 1
        places = json.loads(_file(work, unit, "places").read_bytes())
        named[str(document)] = places[int(stays[document] - ends[unit])]
    content = {
        "request": work.request,
        "same": [n for n in gone.tolist() if same[n]],
        "near": [n for n in gone.tolist() if not same[n]],
        "stays": named,
    }
    write_whole(_file(work, number, "left_out"), json.dumps(content, ensure_ascii=False).encode())
    return len(named)


def without_duplicates(
    work: Work, unit: Unit, documents: Iterable[Document], report: Report
) -> Iterator[Document]:
    """A unit's documents but those that `decide` leaves out, which the report counts. RunError without a decision."""
    content = _known(_file(work, unit.number, "left_out"), work)
    if content is None:
        raise RunError(
            "is not there although it was written",
            where=str(_file(work, unit.number, "left_out")),
            do="all ranks must see the same folder; run the same command again",
        )
    gone = dict.fromkeys(content["near"], "near_duplicates") | dict.fromkeys(content["same"], "duplicates")
    for number, document in enumerate(documents):
        counter = gone.get(number)
        if counter is None:
            yield document
            continue
        stays = content["stays"].get(str(number), "an earlier document")
        how = "the same as" if counter == "duplicates" else "nearly the same as"
        report.drop(document.text, counter, f"{document.source}: {how} {stays}")


def forget(work: Work) -> None:
    """Remove all signs and decisions."""
    shutil.rmtree(work.out / FOLDER, ignore_errors=True)
