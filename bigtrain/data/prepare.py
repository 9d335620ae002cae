"""Raw text in, a corpus folder out: tokenizer.model, shards for train and validation, dataset.json last.

A folder without dataset.json is an unfinished one: preparing again starts it over. The work is a pipeline of
iterators from `Source` to shard; several workers can each run it on their own sources.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.data.corpus import Corpus
from bigtrain.data.documents import BadUtf8, Document, ReadOptions, Report, read_documents
from bigtrain.data.encode import ShardSet, encoded
from bigtrain.data.files import disk_errors, write_whole
from bigtrain.data.manifest import NAME, SPLITS, TOKENIZER, read_manifest, totals, write_manifest
from bigtrain.data.sampling import sample_texts
from bigtrain.data.shards import ShardInfo
from bigtrain.data.sources import LOOKED_FOR, Source, find_sources
from bigtrain.data.splitting import shuffled, split_documents
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.vocabulary import Kind, train_tokenizer
from bigtrain.errors import UserError

_SHARD_FILE = re.compile(r"(train|validation)-\d{5}\.(bin|idx|json)(\.tmp)?|dataset\.json\.tmp")


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how."""

    inputs: tuple[str, ...]
    """Files, folders or globs (see sources.find_sources)."""
    out: Path
    """Folder to write; it is made if it does not exist."""
    tokenizer: Path | None = None
    """An existing SentencePiece model. None: train one on a sample of the text."""
    tokenizer_kind: Kind = "bpe"
    vocab_size: int = 32000
    byte_fallback: bool = True
    tokenizer_sample_mb: float = 100.0
    """Text to train the tokenizer on, in 1e6 bytes; training needs about 20 times as much memory."""
    validation_fraction: float = 0.01
    """Share of the documents to hold out, in [0, 1)."""
    shard_tokens: int = 2**30
    """A shard is closed once it has this many tokens."""
    text_key: str = "text"
    bad_utf8: BadUtf8 = "replace"
    max_bad: float = 0.1
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders to leave out inside input folders."""
    seed: int = 1
    """Decides the tokenizer's sample and the order of the documents."""
    shuffle_mb: float = 64.0
    """Buffer of the document shuffle in 1e6 characters; 0 keeps the order of the inputs."""
    overwrite: bool = False
    """Replace a finished corpus in `out`."""


class Progress(NamedTuple):
    """Where a preparation is."""

    stage: str
    """ "tokenizer" (reading the sample), "training" (the tokenizer) or "encode"."""
    done_bytes: int
    total_bytes: int
    """Of the input files on disk, in this stage."""
    documents: int
    tokens: int


@dataclass(frozen=True)
class PrepareSummary:
    """What came out; everything but `seconds` and `already_done` also stands in dataset.json."""

    out: Path
    vocab_size: int
    splits: dict[str, dict[str, int]]
    """Shards, documents, tokens and text_bytes, by split."""
    skipped: dict[str, int]
    """Counters of what was left out or repaired (documents.Report), without zeros."""
    ignored: dict[str, int]
    """Files in folders that are not text by their name, by suffix."""
    examples: list[str] = field(default_factory=list)
    """The first few of `skipped`, with file and line."""
    seconds: float = 0.0
    already_done: bool = False
    """The folder already held exactly this corpus; nothing was written."""


def prepare(
    options: PrepareOptions, on_progress: Callable[[Progress], None] = lambda _: None
) -> PrepareSummary:
    """Prepare a corpus; returns when dataset.json is on the disk.

    UserError: bad options or input (see sources, documents, vocabulary), or `out` holds another corpus.
    RunError: the disk is full; nothing half-written looks finished, and the same command starts over.
    """
    began = time.monotonic()
    _check(options)
    found = find_sources(options.inputs, options.exclude)
    request = _request(options, found.sources)
    if (done := _existing(options, request)) is not None:
        return done
    _clear(options.out)
    tokenizer = _tokenizer(options, found.sources, on_progress)
    report = Report()
    shards = _encode(options, found.sources, tokenizer, report, on_progress)
    summary = PrepareSummary(
        out=options.out,
        vocab_size=tokenizer.vocab_size,
        splits={split: totals(infos) for split, infos in shards.items()},
        skipped=report.skipped(),
        ignored=dict(found.ignored),
        examples=report.examples,
    )
    facts = {"skipped": summary.skipped, "ignored": summary.ignored, "examples": summary.examples}
    write_manifest(options.out, tokenizer, shards, request=request, summary=facts)
    return replace(summary, seconds=time.monotonic() - began)


def _check(options: PrepareOptions) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise UserError(
            f"validation_fraction {options.validation_fraction} must be at least 0 and below 1",
            do="0.01 holds out one document in a hundred",
        )
    if options.shard_tokens < 1 or options.tokenizer_sample_mb <= 0 or options.shuffle_mb < 0:
        raise UserError("shard_tokens and tokenizer_sample_mb must be positive, shuffle_mb not negative")
    if options.out.exists() and not options.out.is_dir():
        raise UserError("the output is a file", where=str(options.out), do="name a folder with --out")


def _request(options: PrepareOptions, sources: list[Source]) -> dict[str, Any]:
    """What decides the result, as JSON: the options and the input files with their sizes and times."""
    values = {
        k: v for k, v in asdict(options).items() if k not in ("out", "overwrite", "inputs", "tokenizer")
    }
    files = [(str(s.path), s.size, s.path.stat().st_mtime_ns) for s in sources]
    values["inputs"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    values["input_files"] = len(files)
    values["tokenizer"] = Tokenizer.load(options.tokenizer).sha256 if options.tokenizer else None
    request: dict[str, Any] = json.loads(json.dumps(values))
    return request


def _existing(options: PrepareOptions, request: dict[str, Any]) -> PrepareSummary | None:
    """The summary of the corpus in `out` if it is this one, None without one. UserError: it is another."""
    if options.overwrite or not (options.out / NAME).exists():
        return None
    manifest = read_manifest(options.out)
    different = [key for key in request if request[key] != manifest.request.get(key)]
    if different:
        raise UserError(
            f"already holds a corpus, prepared with another {', '.join(different)}",
            where=str(options.out),
            do="choose a fresh folder with --out, or replace this corpus with --overwrite",
        )
    for split in SPLITS:
        Corpus.open(options.out, split)  # sizes and tokenizer are still right
    return PrepareSummary(
        out=options.out,
        vocab_size=manifest.tokenizer["vocab_size"],
        splits={split: totals(infos) for split, infos in manifest.splits.items()},
        **manifest.summary,
        already_done=True,
    )


def _clear(out: Path) -> None:
    """Make the folder; remove an unfinished or unwanted corpus, its manifest first."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / NAME).unlink(missing_ok=True)
        for file in out.iterdir():
            if _SHARD_FILE.fullmatch(file.name):
                file.unlink()


def _read(
    options: PrepareOptions,
    sources: list[Source],
    report: Report,
    tell: Callable[[Report], None],
) -> Iterator[Document]:
    """The documents, with a word to `tell` every fifth of a second."""
    read = ReadOptions(options.text_key, options.bad_utf8, options.max_bad)
    last = 0.0
    for document in read_documents(sources, read, report):
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            tell(report)
        yield document
    tell(report)


def _tokenizer(
    options: PrepareOptions, sources: list[Source], on_progress: Callable[[Progress], None]
) -> Tokenizer:
    """The tokenizer of this corpus, in its place. UserError if a given one has no end-of-sentence piece."""
    out = options.out / TOKENIZER
    if options.tokenizer is not None:
        given = Tokenizer.load(options.tokenizer)
        if given.eos_id < 0:
            raise UserError(
                "has no end-of-sentence piece, which ends a document",
                where=str(given.path),
                do="train the tokenizer with an eos_id, or let prepare train one",
            )
        write_whole(out, given.model)
        return Tokenizer.load(out)
    total = sum(source.size for source in sources)

    def tell(report: Report, stage: str = "tokenizer") -> None:
        on_progress(Progress(stage, report.position, total, report.documents, 0))

    report = Report()
    texts = (document.text for document in _read(options, sources, report, tell))
    sample = sample_texts(texts, int(options.tokenizer_sample_mb * 1e6), options.seed)
    _check_not_empty(report, options)
    tell(report, "training")
    return train_tokenizer(
        sample,
        out,
        kind=options.tokenizer_kind,
        vocab_size=options.vocab_size,
        byte_fallback=options.byte_fallback,
    )


def _check_not_empty(report: Report, options: PrepareOptions) -> None:
    if not report.documents:
        left_out = ", ".join(f"{count} {name}" for name, count in report.skipped().items()) or "no documents"
        raise UserError(
            f"there is no text in the inputs ({left_out}); looked for {LOOKED_FOR}",
            where=", ".join(options.inputs),
            do="name files that hold text; for JSON lines and parquet check --text-key",
        )


def _encode(
    options: PrepareOptions,
    sources: list[Source],
    tokenizer: Tokenizer,
    report: Report,
    on_progress: Callable[[Progress], None],
) -> dict[str, list[ShardInfo]]:
    """Write all shards of both splits. UserError if there is no document at all."""
    total = sum(source.size for source in sources)
    sets = {split: ShardSet(options.out, split, tokenizer, options.shard_tokens) for split in SPLITS}

    def tell(report: Report) -> None:
        tokens = sum(each.tokens for each in sets.values())
        on_progress(Progress("encode", report.position, total, report.documents, tokens))

    try:
        documents = _read(options, sources, report, tell)
        if options.shuffle_mb:
            documents = shuffled(documents, int(options.shuffle_mb * 1e6), options.seed)
        for split, document, tokens in encoded(
            split_documents(documents, options.validation_fraction), tokenizer
        ):
            size = len(document.text) if document.text.isascii() else len(document.text.encode())
            sets[split].add(tokens, text_bytes=size, source=document.source)
        _check_not_empty(report, options)
        shards = {str(split): each.finish() for split, each in sets.items()}
    finally:
        for each in sets.values():
            each.abort()
    tell(report)
    return shards
