"""One unit of the inputs to its shards: what a worker does, whoever it is.

When the shards of a unit are on the disk, `units/00012.json` says so, with what was read and left out. It holds for
the same request only; a unit that has it is not done again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bigtrain.data.documents import Report, read_documents, utf8_bytes
from bigtrain.data.duplicates import without_duplicates
from bigtrain.data.encode import ShardSet, encoded
from bigtrain.data.files import disk_errors, write_whole
from bigtrain.data.manifest import SPLITS, Split
from bigtrain.data.shards import ShardInfo
from bigtrain.data.splitting import by_hash, shuffled, split_documents
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.units import Unit
from bigtrain.data.work import Tell, Work

FOLDER = "units"
"""Of the done units' records, in the corpus folder, until all are done."""


@dataclass(frozen=True)
class Done:
    """What came out of a unit."""

    report: Report
    shards: dict[str, list[ShardInfo]]

    @property
    def tokens(self) -> int:
        """Of both splits."""
        return sum(info.tokens for infos in self.shards.values() for info in infos)


def record_of(work: Work, number: int) -> Path:
    """Where a unit's record lies."""
    return work.out / FOLDER / f"{number:05d}.json"


def done_before(work: Work, number: int) -> Done | None:
    """What a unit came to in an earlier attempt at the same request; None if it has to be done (again)."""
    try:
        content = json.loads(record_of(work, number).read_bytes())
    except (OSError, ValueError):
        return None
    if content.get("request") != work.request:
        return None
    shards = {
        split: [ShardInfo(**{**info, "crc32": tuple(info["crc32"])}) for info in infos]
        for split, infos in content["shards"].items()
    }
    for infos in shards.values():
        for info in infos:
            for suffix, size in info.files.items():
                file = work.out / f"{info.name}{suffix}"
                if not file.exists() or file.stat().st_size != size:
                    return None
    return Done(Report(**content["report"]), shards)


def do_unit(
    work: Work,
    unit: Unit,
    tokenizer: Tokenizer,
    threads: int,
    tell: Tell = lambda report, tokens: None,
) -> Done:
    """Write a unit's shards and its record; `tell` hears a few times a second how much was read and encoded.

    UserError: see documents.read_documents. RunError: the disk is full.
    """
    report = Report()
    names = {split: _names(work, unit, split) for split in SPLITS}
    sets = {split: ShardSet(work.out, names[split], tokenizer, work.shard_tokens) for split in SPLITS}
    last = 0.0
    try:
        documents = read_documents(unit.pieces, work.read, report)
        if work.dedup:
            documents = without_duplicates(work, unit, documents, report)
        if work.shuffle_mb:
            # One unit is shuffled as before there were units; the others each in an order of their own.
            seed = (
                work.seed if unit.number == 0 else random.Random(f"{work.seed}/{unit.number}").getrandbits(63)
            )
            documents = shuffled(documents, int(work.shuffle_mb * 1e6), seed)
        split = split_documents if unit.number == 0 else by_hash
        sides = split(documents, work.validation_fraction)
        for each in encoded(sides, tokenizer, threads, masks=work.read.chat is not None):
            text = each.document.text
            if tokenizer.changes_space_symbol(text):
                report.note("space_symbols", f"{each.document.source}: U+2581 becomes a space")
            sets[each.split].add(
                each.tokens, text_bytes=utf8_bytes(text), source=each.document.source, mask=each.mask
            )
            if (now := time.monotonic()) - last > 0.2:
                last = now
                tell(report, sum(each.tokens for each in sets.values()))
        done = Done(report, {str(side): shards.finish() for side, shards in sets.items()})
    finally:
        for shards in sets.values():
            shards.abort()
    content = {
        "request": work.request,
        "report": asdict(report),
        "shards": {side: [asdict(info) for info in infos] for side, infos in done.shards.items()},
    }
    record = record_of(work, unit.number)
    with disk_errors(record):
        record.parent.mkdir(exist_ok=True)
    write_whole(record, json.dumps(content, ensure_ascii=False).encode())
    return done


def _names(work: Work, unit: Unit, split: Split) -> Callable[[int], str]:
    """Name of a unit's n-th shard: train-00000 and so on in a corpus of one unit, else by the unit."""
    if work.units == 1:
        return lambda n: f"{split}-{n:05d}"
    return lambda n: f"{split}-{unit.number:05d}" + (f"-{n}" if n else "")
