"""Read documents out of files. Bad input is counted and named; too much of it stops the run.

A text or source file is one document; each JSON line and each parquet row is one. What is left out or
repaired stands in a `Report`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from bigtrain.data.chats import ChatFormat, Segments
from bigtrain.data.filters import COUNTERS as FILTERED
from bigtrain.data.filters import NO_LIMITS, Filters
from bigtrain.data.sources import Source
from bigtrain.data.tokenizer import replace_surrogates
from bigtrain.data.units import Piece, whole
from bigtrain.data.unpack import open_packed, optional
from bigtrain.errors import UserError

BadUtf8 = Literal["replace", "skip", "fail"]
_EXAMPLES = 10
_COUNTERS = (
    *("empty", "bad_lines", "bad_utf8", "surrogates", "binary"),
    *FILTERED,
    *("duplicates", "near_duplicates"),
    "space_symbols",
)
_EARLY = 1000
"""After this many unusable lines over the limit a file is given up without reading the rest."""


@dataclass(frozen=True)
class Document:
    """One text and where it came from (file, or file:line)."""

    text: str
    source: str
    """The file, file:line, or file@byte inside a part of a large file."""
    segments: Segments = ()
    """Of a conversation: its text in parts, each with whether it is learned. () where all is."""


@dataclass(frozen=True)
class ReadOptions:
    """How to read, and what to do about bad input."""

    text_key: str = "text"
    """Key of a JSON line, or column of a parquet file, that holds the text."""
    bad_utf8: BadUtf8 = "replace"
    """Invalid bytes: replace each by U+FFFD, skip the document, or fail."""
    max_bad: float = 0.1
    """Share of a file's lines or rows that may be unusable."""
    chat: ChatFormat | None = None
    """JSON lines hold conversations."""
    filters: Filters = NO_LIMITS
    """Documents that break a limit are left out."""


@dataclass
class Report:
    """What was read, left out and repaired."""

    documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    empty: int = 0
    """Documents without any character: skipped."""
    bad_lines: int = 0
    """JSON lines that are malformed or hold no string under the text key, rows without text: skipped."""
    bad_utf8: int = 0
    """Documents with invalid UTF-8: repaired, or skipped if so asked."""
    surrogates: int = 0
    """Lone surrogates replaced by U+FFFD."""
    binary: int = 0
    """Files with NUL bytes at their beginning: skipped."""
    too_short: int = 0
    too_long: int = 0
    repeated_lines: int = 0
    symbols: int = 0
    repetitive: int = 0
    incompressible: int = 0
    """Documents that break a limit of `filters.Filters`: skipped."""
    duplicates: int = 0
    near_duplicates: int = 0
    """Documents that came before (`duplicates.decide`): skipped."""
    space_symbols: int = 0
    """Documents with U+2581, for a tokenizer that gives it back as a space: kept."""
    examples: list[str] = field(default_factory=list)
    """The first few of the above, as "file:line: what"."""
    position: int = 0
    """Bytes of the source files behind us, for a progress bar."""

    def note(self, counter: str, example: str) -> None:
        """Count one and remember it if it is among the first."""
        setattr(self, counter, getattr(self, counter) + 1)
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)

    def drop(self, text: str, counter: str, example: str) -> None:
        """Count out a document that was counted in as read."""
        self.documents -= 1
        self.text_bytes -= utf8_bytes(text)
        self.note(counter, example)

    def skipped(self) -> dict[str, int]:
        """Counters of what was left out or repaired, without those that are 0."""
        return {name: getattr(self, name) for name in _COUNTERS if getattr(self, name)}

    def add(self, other: Report) -> None:
        """Count in what another worker read, after this."""
        for name in ("documents", "text_bytes", *_COUNTERS, "position"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = [*self.examples, *other.examples][:_EXAMPLES]


def utf8_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def read_documents(
    sources: Iterable[Source | Piece], options: ReadOptions, report: Report
) -> Iterator[Document]:
    """The documents of files, or parts of files, in their order; `report` is filled on the way.

    No document is empty and all can be written as UTF-8.
    UserError: unreadable or damaged file, invalid UTF-8 under bad_utf8 = "fail", too many bad lines, no such
    column, a package that the format needs is missing.
    """
    readers = {"text": _text, "jsonl": _json_lines, "parquet": _parquet}
    behind = 0
    for given in sources:
        piece = given if isinstance(given, Piece) else whole(given)
        for text, where in readers[piece.source.kind](piece, options, report, behind):
            clean, surrogates = replace_surrogates(
                text if isinstance(text, str) else "".join(t for t, _ in text)
            )
            if surrogates and len(report.examples) < _EXAMPLES:
                report.examples.append(f"{where}: lone surrogate")
            report.surrogates += surrogates
            if not clean:
                report.note("empty", f"{where}: empty document")
                continue
            if (found := options.filters.problem(clean)) is not None:
                report.note(found[0], f"{where}: {found[1]}")
                continue
            report.documents += 1
            report.text_bytes += utf8_bytes(clean)
            segments = () if isinstance(text, str) else tuple((replace_surrogates(t)[0], c) for t, c in text)
            yield Document(clean, where, segments)
        behind += piece.size
        report.position = behind


def _text(piece: Piece, options: ReadOptions, report: Report, _: int) -> Iterator[tuple[str, str]]:
    source = piece.source
    where = str(source.path)
    with open_packed(source.path, source.packed) as (stream, _raw):
        data = stream.read(8192)
        if b"\0" in data:
            report.note("binary", f"{where}: binary, or not UTF-8 (NUL bytes)")
            return
        data += stream.read()
    text = _decode(data, where, where, 0, options, report)
    if text is not None:
        yield text.removeprefix("\ufeff"), where


def _decode(
    data: bytes, where: str, file: str, offset: int, options: ReadOptions, report: Report
) -> str | None:
    """Text of the bytes at `offset` of a file; None if the document is to be skipped."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        what = f"invalid UTF-8 at byte {offset + error.start}"
        if options.bad_utf8 == "fail":
            advice = "convert the file to UTF-8, or use --bad-utf8 replace or skip"
            raise UserError(what, where=file, do=advice) from error
        report.note("bad_utf8", f"{where}: {what}")
        return None if options.bad_utf8 == "skip" else data.decode(errors="replace")


class _Share:
    """Unusable lines of one file, or of one part of a large file, and the limit on their share."""

    def __init__(self, source: Source, options: ReadOptions, report: Report) -> None:
        self._file, self._limit, self._report = str(source.path), options.max_bad, report
        self._bad = 0
        self._first: list[str] = []

    def bad(self, where: str, why: str, lines: int) -> None:
        """Count the line at `where`, one of the `lines` so far; UserError if by now there are hopelessly many."""
        self._report.note("bad_lines", f"{where}: {why}")
        self._bad += 1
        if len(self._first) < 3:
            self._first.append(f"{where.removeprefix(self._file).replace(':', 'line ').lstrip('@')}: {why}")
        if self._bad >= _EARLY:
            self.check(lines)

    def check(self, lines: int) -> None:
        """UserError if more than the limit of the `lines` read so far are bad."""
        if self._bad > self._limit * lines:
            raise UserError(
                f"{self._bad} of {lines} lines are unusable, more than the {self._limit:.0%} allowed "
                f"({'; '.join(self._first)})",
                where=self._file,
                do="repair the file, name the right --text-key, or raise --max-bad",
            )


def _json_lines(
    piece: Piece, options: ReadOptions, report: Report, behind: int
) -> Iterator[tuple[str | Segments, str]]:
    source = piece.source
    file = str(source.path)
    share = _Share(source, options, report)
    lines = offset = 0
    with open_packed(source.path, source.packed) as (stream, raw):
        start, end = piece.part or (0, None)
        if start:  # behind the line that the part before began
            raw.seek(start - 1)
            offset = start - 1 + len(stream.readline())
        for number, line in enumerate(stream, 1):
            if end is not None and offset >= end:
                break
            report.position = behind + raw.tell() - start
            where = f"{file}@{offset}" if start else f"{file}:{number}"
            if line.strip():
                lines += 1
                decoded = _decode(line, where, file, offset, options, report)
                if decoded is not None:
                    text = _json_text(decoded.removeprefix("\ufeff").strip(), options)
                    if isinstance(text, _Unusable):
                        share.bad(where, text.why, lines)
                    else:
                        yield text, where
            offset += len(line)
    share.check(lines)


@dataclass(frozen=True)
class _Unusable:
    why: str


def _json_text(line: str, options: ReadOptions) -> str | Segments | _Unusable:
    try:
        value = json.loads(line)
    except RecursionError:
        return _Unusable("malformed JSON (nested too deeply)")
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return _Unusable(f"malformed JSON ({reason})")
    if not isinstance(value, dict):
        return _Unusable(f"not a JSON object but {type(value).__name__}")
    if options.chat is not None:
        segments = options.chat.segments(value)
        return _Unusable(segments) if isinstance(segments, str) else segments
    key = options.text_key
    if key not in value:
        return _Unusable(f"no key {key!r}, only " + ", ".join(map(repr, list(value)[:5])))
    text = value[key]
    return text if isinstance(text, str) else _Unusable(f"{key!r} is {type(text).__name__}, not a string")


def _parquet(piece: Piece, options: ReadOptions, report: Report, behind: int) -> Iterator[tuple[str, str]]:
    source = piece.source
    arrow = optional("pyarrow", "parquet", source.path)
    parquet = optional("pyarrow.parquet", "parquet", source.path)
    file = str(source.path)
    if options.chat is not None:
        raise UserError(
            "conversations are read from JSON lines only",
            where=file,
            do="convert it to .jsonl, or leave it out",
        )
    share = _Share(source, options, report)
    row = first = 0
    try:
        with parquet.ParquetFile(source.path) as table:
            _check_column(table.schema_arrow, options.text_key, file, arrow)
            start, end = piece.part or (0, table.num_row_groups)
            counts = [table.metadata.row_group(i).num_rows for i in range(end)]
            row = first = sum(counts[:start])
            rows = max(1, sum(counts[start:]))
            groups = list(range(start, end))
            for batch in table.iter_batches(1024, groups, columns=[options.text_key]):
                for data in _as_bytes(batch.column(0), arrow):
                    row += 1
                    if data is None:
                        share.bad(f"{file}:{row}", f"no text in column {options.text_key!r}", row - first)
                        continue
                    text = _decode(data, f"{file}:{row}", f"{file}:{row}", 0, options, report)
                    if text is not None:
                        yield text, f"{file}:{row}"
                report.position = behind + piece.size * (row - first) // rows
    except (arrow.ArrowException, OSError) as error:
        raise UserError(
            f"cannot be read as parquet ({error})", where=file, do="fetch the file again, or leave it out"
        ) from error
    share.check(row - first)


def _check_column(schema: Any, key: str, file: str, arrow: Any) -> None:
    """UserError if there is no such column or it holds no text."""
    if key not in schema.names:
        raise UserError(
            f"no column {key!r}; there are " + ", ".join(map(repr, schema.names)),
            where=file,
            do="name the column with --text-key",
        )
    kind = schema.field(key).type
    kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
    tests = (
        arrow.types.is_string,
        arrow.types.is_large_string,
        arrow.types.is_binary,
        arrow.types.is_large_binary,
    )
    if not any(test(kind) for test in tests):
        raise UserError(
            f"column {key!r} holds {kind}, not text", where=file, do="name another with --text-key"
        )


def _as_bytes(column: Any, arrow: Any) -> list[bytes | None]:
    """Arrow does not check UTF-8, so take the bytes and decode them under our rules."""
    if arrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found: list[bytes | None] = column.cast(arrow.large_binary()).to_pylist()
    return found
