"""Raw text in, a corpus folder out: tokenizer.model, shards for train and validation, dataset.json last.

The inputs are cut into units (units.py), each of which becomes shards of its own (unit_work.py), whoever does it
(crew.py). A folder without dataset.json is an unfinished one: preparing again goes on with what is not done.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bigtrain.data.chats import ChatFormat, template_of
from bigtrain.data.corpus import Corpus
from bigtrain.data.crew import crew
from bigtrain.data.documents import BadUtf8, ReadOptions, Report, read_documents
from bigtrain.data.duplicates import decide, forget
from bigtrain.data.encoders import Name, choose
from bigtrain.data.files import disk_errors, write_whole
from bigtrain.data.filters import NO_LIMITS, Filters
from bigtrain.data.manifest import NAME, SPLITS, TOKENIZER, read_manifest, totals, write_manifest
from bigtrain.data.sampling import sample_texts
from bigtrain.data.shards import ShardInfo
from bigtrain.data.sources import LOOKED_FOR, Found, Source, find_sources
from bigtrain.data.tokenizer import Tokenizer
from bigtrain.data.unit_work import FOLDER, done_before, record_of
from bigtrain.data.units import Piece, Unit, spread, unit_bytes, units_of
from bigtrain.data.vocabulary import Kind, train_tokenizer
from bigtrain.data.work import Work, digest
from bigtrain.errors import RunError, UserError

_SHARD_FILE = re.compile(
    r"(train|validation)-\d{5}(-\d+)?\.(bin|idx|json|mask|pack\d+)(\.tmp)?|dataset\.json\.tmp|pack\d+\.json(\.tmp)?"
)
_TOKENIZER_OF = "tokenizer.request"
"""What the tokenizer here was trained for, until the corpus is finished."""
_TRIED = 4 * 10**6
"""Characters that an encoder is tried on."""
_SAMPLED_FROM = 16
"""Times the tokenizer's sample: so much is read to draw it from, of a corpus that has more."""


Dedup = Literal["none", "exact", "near"]
_NOT_ASKED = ("out", "overwrite", "inputs", "tokenizer", "workers", "encoder")
"""Options that do not decide the result, or do by what they name."""


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
    chat_key: str = ""
    """JSON lines hold conversations under this key (see chats.ChatFormat); only the responses are learned."""
    prompt_key: str = ""
    response_key: str = ""
    """JSON lines hold a prompt and a response under these keys."""
    chat_template: str = ""
    """Name or file (chats.template_of). Default: chatml for conversations, none for prompt and response."""
    filters: Filters = NO_LIMITS
    """Limits that documents have to keep."""
    dedup: Dedup = "none"
    """exact: leave out documents whose text came before; near: also those that are nearly the same."""
    dedup_threshold: float = 0.8
    """near: from which Jaccard index on, of their stretches of 8 characters, documents are nearly the same."""
    bad_utf8: BadUtf8 = "replace"
    max_bad: float = 0.1
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders to leave out inside input folders."""
    seed: int = 1
    """Decides the tokenizer's sample and the order of the documents."""
    shuffle_mb: float = 64.0
    """Buffer of the document shuffle, inside a unit, in 1e6 characters; 0 keeps the order of the inputs."""
    unit_mb: float = 0.0
    """Bytes of input, in 1e6, that one worker takes at a time and that become shards of their own; 0: as many as
    suit the size of the corpus (units.unit_bytes)."""
    workers: int = 0
    """Processes on this machine; 0: one a core. The result does not depend on it. Under mpirun its ranks work."""
    encoder: Name | Literal["auto"] = "sentencepiece"
    """auto: the fastest that is installed and exact on a sample of the text; the result is the same (encoders)."""
    overwrite: bool = False
    """Replace a finished corpus in `out`."""

    @property
    def read(self) -> ReadOptions:
        """How to read the inputs."""
        return ReadOptions(self.text_key, self.bad_utf8, self.max_bad, self._chat, self.filters)

    @property
    def _chat(self) -> ChatFormat | None:
        if not (self.chat_key or self.prompt_key):
            return None
        template = template_of(self.chat_template or ("chatml" if self.chat_key else "none"))
        return ChatFormat(self.chat_key, self.prompt_key, self.response_key, template)


class Progress(NamedTuple):
    """Where a preparation is."""

    stage: str
    """ "tokenizer" (reading the sample), "training" (the tokenizer), "duplicates" or "encode"."""
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
    encoder: str = "sentencepiece"
    notes: list[str] = field(default_factory=list)
    """Why a faster encoder was not used."""
    seconds: float = 0.0
    already_done: bool = False
    """The folder already held exactly this corpus; nothing was written."""


def prepare(
    options: PrepareOptions, on_progress: Callable[[Progress], None] = lambda _: None
) -> PrepareSummary:
    """Prepare a corpus; returns when dataset.json is on the disk. Under mpirun all ranks call it together.

    UserError: bad options or input (see sources, documents, vocabulary), or `out` holds another corpus.
    RunError: the disk is full, or a worker was killed; nothing half-written looks finished, and the same command
    goes on with the units that are not done.
    """
    began = time.monotonic()
    _check(options)
    found = find_sources(options.inputs, options.exclude)
    units = units_of(found.sources, int(options.unit_mb * 1e6) or unit_bytes(found.sources))
    request = _request(options, found.sources)
    workers = crew(options.workers, len(units))
    if (done := workers.share(lambda: _existing(options, request))) is not None:
        return done
    work = workers.share(lambda: _begin(options, units, request, on_progress))
    total = sum(unit.size for unit in units)

    def tell(stage: str, done: int, documents: int, tokens: int) -> None:
        on_progress(Progress(stage, min(done, total), total, documents, tokens))

    if work.dedup:
        workers.do("sign", work, units, partial(tell, "duplicates"))
        workers.share(lambda: decide(work))
    workers.do("encode", work, units, partial(tell, "encode"))
    summary = workers.share(lambda: _finish(options, work, found, request))
    return replace(summary, seconds=time.monotonic() - began)


def _begin(
    options: PrepareOptions,
    units: Sequence[Unit],
    request: dict[str, Any],
    on_progress: Callable[[Progress], None],
) -> Work:
    """Everything that comes before the units: the folder, what is left of an earlier attempt, the tokenizer."""
    with disk_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / NAME).unlink(missing_ok=True)
    tokenizer = _tokenizer(options, units, request, on_progress)
    notes: list[str] = []
    encoder = choose(options.encoder, tokenizer, _sample(options, units), notes.append)
    work = Work(
        out=options.out,
        request=digest(request, tokenizer),
        units=len(units),
        read=options.read,
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        shuffle_mb=options.shuffle_mb,
        seed=options.seed,
        encoder=encoder,
        notes=tuple(notes),
        dedup=options.dedup != "none",
        near=options.dedup_threshold if options.dedup == "near" else 0.0,
    )
    _clear(work)
    return work


def _sample(options: PrepareOptions, units: Sequence[Unit]) -> list[str]:
    """A few megabytes of the text, of evenly spaced units, to try an encoder on; none if there is nothing to try."""
    found: list[str] = []
    if options.encoder == "sentencepiece":
        return found
    chosen = spread(units, 16 * _TRIED)
    for unit in chosen:
        size = 0
        for document in read_documents(unit.pieces, options.read, Report()):
            found.append(document.text[:_TRIED])
            size += len(found[-1])
            if size * len(chosen) > _TRIED:
                break
    return found


def _finish(options: PrepareOptions, work: Work, found: Found, request: dict[str, Any]) -> PrepareSummary:
    """The manifest, from the records of all units; they are removed. UserError if there is no document at all."""
    report = Report()
    shards: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for number in range(work.units):
        done = done_before(work, number)
        if done is None:
            raise RunError(
                f"unit {number} is not there although a worker finished it",
                where=str(record_of(work, number)),
                do="all ranks must see the same folder; run the same command again",
            )
        report.add(done.report)
        for split, infos in done.shards.items():
            shards[split] += infos
    _check_not_empty(report, options)
    tokenizer = Tokenizer.load(options.out)
    summary = PrepareSummary(
        out=options.out,
        vocab_size=tokenizer.vocab_size,
        splits={split: totals(infos) for split, infos in shards.items()},
        skipped=report.skipped(),
        ignored=dict(found.ignored),
        examples=report.examples,
        encoder=work.encoder,
        notes=list(work.notes),
    )
    told = ("skipped", "ignored", "examples", "encoder", "notes")
    facts = {name: getattr(summary, name) for name in told}
    write_manifest(options.out, tokenizer, shards, request=request, summary=facts)
    shutil.rmtree(options.out / FOLDER, ignore_errors=True)
    forget(work)
    (options.out / _TOKENIZER_OF).unlink(missing_ok=True)
    return summary


def _check(options: PrepareOptions) -> None:
    if not 0 <= options.validation_fraction < 1:
        raise UserError(
            f"validation_fraction {options.validation_fraction} must be at least 0 and below 1",
            do="0.01 holds out one document in a hundred",
        )
    if options.shard_tokens < 1 or options.tokenizer_sample_mb <= 0 or options.shuffle_mb < 0:
        raise UserError("shard_tokens and tokenizer_sample_mb must be positive, shuffle_mb not negative")
    if not 0.5 <= options.dedup_threshold <= 0.99:
        raise UserError(
            f"dedup_threshold {options.dedup_threshold} must be from 0.5 to 0.99",
            do="0.8 finds documents of which a tenth of the text was changed; for equal texts use dedup exact",
        )
    if options.workers < 0 or options.unit_mb < 0:
        raise UserError("workers and unit_mb must not be negative", do="leave them out: 0 chooses")
    pair = bool(options.prompt_key), bool(options.response_key)
    if pair[0] != pair[1] or (pair[0] and options.chat_key):
        raise UserError(
            "conversations are given by --chat-key, or by --prompt-key and --response-key together",
            do="name one or the other",
        )
    if options.chat_template and not (options.chat_key or pair[0]):
        raise UserError(
            "--chat-template is for conversations", do="add --chat-key, or --prompt-key and --response-key"
        )
    if options.out.exists() and not options.out.is_dir():
        raise UserError("the output is a file", where=str(options.out), do="name a folder with --out")


def _request(options: PrepareOptions, sources: list[Source]) -> dict[str, Any]:
    """What decides the result, as JSON: the options and the input files with their sizes and times."""
    values = {k: v for k, v in asdict(options).items() if k not in _NOT_ASKED}
    files = [(str(s.path), s.size, s.path.stat().st_mtime_ns) for s in sources]
    values["inputs"] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    values["input_files"] = len(files)
    if options.read.chat is not None:
        values["chat_template"] = asdict(options.read.chat.template)
    values["tokenizer"] = Tokenizer.load(options.tokenizer).sha256 if options.tokenizer else None
    request: dict[str, Any] = json.loads(json.dumps(values))
    return request


def _plain(default: Any) -> Any:
    return asdict(default) if isinstance(default, Filters) else default


def _existing(options: PrepareOptions, request: dict[str, Any]) -> PrepareSummary | None:
    """The summary of the corpus in `out` if it is this one, None without one. UserError: it is another."""
    if options.overwrite or not (options.out / NAME).exists():
        return None
    manifest = read_manifest(options.out)
    default = {
        f.name: _plain(f.default) for f in fields(PrepareOptions)
    }  # of options that came after that corpus
    different = [key for key in request if request[key] != manifest.request.get(key, default.get(key))]
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


def _clear(work: Work) -> None:
    """Remove what an earlier attempt, or another corpus, left and no finished unit of this request owns."""
    if not work.dedup:
        forget(work)
    finished = {n: done for n in range(work.units) if (done := done_before(work, n)) is not None}
    shards = {info.name for done in finished.values() for infos in done.shards.values() for info in infos}
    kept = {f"{name}{suffix}" for name in shards for suffix in (".bin", ".idx", ".mask", ".json")}
    with disk_errors(work.out):
        for file in work.out.iterdir():
            if _SHARD_FILE.fullmatch(file.name) and file.name not in kept:
                file.unlink()
        for record in (work.out / FOLDER).glob("*"):
            if not record.stem.isdigit() or int(record.stem) not in finished:
                record.unlink()


def _tokenizer(
    options: PrepareOptions,
    units: Sequence[Unit],
    request: dict[str, Any],
    on_progress: Callable[[Progress], None],
) -> Tokenizer:
    """The tokenizer of this corpus, in its place. UserError if a given one has no end-of-sentence piece.

    One that was trained by an earlier attempt at the same request is kept. Of a large corpus only evenly spaced
    units are read for the sample.
    """
    out, trained_for = options.out / TOKENIZER, options.out / _TOKENIZER_OF
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
    asked = json.dumps(request, sort_keys=True)
    if out.exists() and trained_for.exists() and trained_for.read_text() == asked:
        return Tokenizer.load(out)
    trained_for.unlink(missing_ok=True)
    chosen = spread(units, int(_SAMPLED_FROM * options.tokenizer_sample_mb * 1e6))
    total = sum(unit.size for unit in chosen)
    report = Report()
    texts = _texts(options, [piece for unit in chosen for piece in unit.pieces], total, report, on_progress)
    sample = sample_texts(texts, int(options.tokenizer_sample_mb * 1e6), options.seed)
    _check_not_empty(report, options)
    on_progress(Progress("training", total, total, report.documents, 0))
    tokenizer = train_tokenizer(
        sample,
        out,
        kind=options.tokenizer_kind,
        vocab_size=options.vocab_size,
        byte_fallback=options.byte_fallback,
    )
    write_whole(trained_for, asked.encode())
    return tokenizer


def _texts(
    options: PrepareOptions,
    pieces: Sequence[Piece],
    total: int,
    report: Report,
    on_progress: Callable[[Progress], None],
) -> Iterator[str]:
    """The texts to sample from, with a word on progress every fifth of a second."""
    last = 0.0
    for document in read_documents(pieces, options.read, report):
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            on_progress(Progress("tokenizer", report.position, total, report.documents, 0))
        yield document.text


def _check_not_empty(report: Report, options: PrepareOptions) -> None:
    if not report.documents:
        left_out = ", ".join(f"{count} {name}" for name, count in report.skipped().items()) or "no documents"
        raise UserError(
            f"there is no text in the inputs ({left_out}); looked for {LOOKED_FOR}",
            where=", ".join(options.inputs),
            do="name files that hold text; for JSON lines and parquet check --text-key",
        )
