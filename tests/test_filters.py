"""Each filter has a document just inside and just outside of its limit."""

from __future__ import annotations

import base64
import json
import random
import sysconfig
from pathlib import Path

import pytest

from bigtrain.cli import main
from bigtrain.data.documents import ReadOptions, Report, read_documents
from bigtrain.data.filters import (
    COUNTERS,
    NO_LIMITS,
    QUALITY,
    Filters,
    compressed,
    filters_of,
    repeated_lines,
    symbols,
)
from bigtrain.data.manifest import read_manifest
from bigtrain.data.sources import find_sources
from bigtrain.errors import UserError
from tests.data_parts import CHINESE, CODE, ENGLISH, HOSTILE, small_tokenizer, texts

NOISE = base64.b64encode(random.Random(1).randbytes(3000)).decode()
PROSE = texts()[0]


@pytest.mark.parametrize(
    ("filters", "inside", "outside", "counter"),
    [
        (Filters(min_chars=10), "x" * 10, "x" * 9, "too_short"),
        (Filters(max_chars=10), "x" * 10, "x" * 11, "too_long"),
        (Filters(max_repeated_lines=0.5), "abcd\nabcd\n\n", "abcd\nabcd\nabcd", "repeated_lines"),
        (Filters(max_symbols=0.25), "a +bc", "+a bc\ufffd", "symbols"),
        (Filters(min_compressed=0.1), PROSE, "spam " * 300, "repetitive"),
        (Filters(max_compressed=0.7), PROSE, NOISE, "incompressible"),
    ],
)
def test_inside_and_outside(filters: Filters, inside: str, outside: str, counter: str) -> None:
    assert filters.problem(inside) is None
    found = filters.problem(outside)
    assert found is not None
    assert found[0] == counter
    assert counter in COUNTERS
    assert NO_LIMITS.problem(outside) is None


def test_the_measures() -> None:
    assert repeated_lines("a\nb\na\n a \n\n\n") == 0.5
    assert repeated_lines("") == symbols("") == symbols(" \n") == 0
    assert symbols("价格100元。") == 0
    assert symbols("$$ab\x00 \n") == 0.6
    assert compressed(NOISE) > 0.74


def test_quality_keeps_prose_and_code_in_any_language_and_leaves_out_what_is_none() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    sources = [p.read_text() for p in sorted(library.glob("*.py")) if p.stat().st_size > 100]
    for text in [*sources, ENGLISH[:80], CHINESE[:50], CODE[:90], PROSE]:
        found = QUALITY.problem(text)
        assert found is None or found[0] in ("repeated_lines", "repetitive"), (found, text[:200])
    assert sum(QUALITY.problem(text) is not None for text in sources) < 0.05 * len(sources)
    for text in (NOISE, "spam " * 1000, "=" * 100, "", "short", *(h for h in HOSTILE if len(h) < 40)):
        assert QUALITY.problem(text) is not None, text[:50]


def test_settings_of_the_command_line() -> None:
    assert filters_of(False, []) == NO_LIMITS
    assert filters_of(True, ["min_chars=7", "max_symbols=0.9"]).min_chars == 7
    with pytest.raises(UserError) as e:
        filters_of(False, ["min_char=1", "max_chars=many", "max_symbols", "min_chars=-1"])
    for text in (
        "no filter 'min_char'",
        "'many' is no whole number",
        "'' is no number",
        "must not be negative",
    ):
        assert text in str(e.value)


def test_each_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        PROSE,
        "tiny",
        NOISE,
        "spam " * 300,
        "one line, twice in this text\n" * 2 + "x",
        "+-" * 40,
        PROSE + ".",
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in lines))
    report = Report()
    options = ReadOptions(filters=QUALITY)
    kept = list(read_documents(find_sources([tmp_path]).sources, options, report))
    assert [d.text for d in kept] == [lines[0], lines[-1]]
    assert report.documents == 2
    assert report.text_bytes == len(lines[0]) + len(lines[-1])
    expected = {"too_short": 1, "incompressible": 1, "repetitive": 1, "repeated_lines": 1, "symbols": 1}
    assert report.skipped() == expected
    assert f"{tmp_path / 'a.jsonl'}:2: 4 characters, less than 50" in report.examples
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--quality"]
    assert main([*command, "--tokenizer", str(small_tokenizer().path), "--filter", "min_chars=2"]) == 0
    out = capsys.readouterr().out
    assert "1 incompressible" in out
    assert "too short" not in out
    assert read_manifest(tmp_path / "out").summary["skipped"] == {k: 1 for k in expected if k != "too_short"}
    assert main([*command, "--tokenizer", str(small_tokenizer().path)]) == 2
    assert "prepared with another filters" in capsys.readouterr().err
