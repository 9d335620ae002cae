"""Reading inputs: every format gives the same documents, every fault is counted, named or refused."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bigtrain.data.documents import Document, ReadOptions, Report, read_documents
from bigtrain.data.sources import find_sources
from bigtrain.errors import UserError
from tests.data_parts import CHINESE, CODE, ENGLISH, HOSTILE

TEXTS = [ENGLISH, CHINESE, CODE, *(t for t in HOSTILE if t)]


def read(*inputs: Path, exclude: tuple[str, ...] = (), **options: object) -> tuple[list[Document], Report]:
    report = Report()
    sources = find_sources(inputs, exclude).sources
    documents = list(read_documents(sources, ReadOptions(**options), report))  # type: ignore[arg-type]
    assert report.position == sum(source.size for source in sources)
    assert report.documents == len(documents)
    assert report.text_bytes == sum(len(d.text.encode()) for d in documents)
    return documents, report


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: t, "n": 1}) + "\n" for t in texts).encode()


def pack(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        half = len(data) // 2  # two frames, as parallel compressors write
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return gzip.compress(data) if suffix == ".gz" else data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_text_files_are_one_document_each_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    texts = ["\r\n".join(TEXTS).replace("\0", ""), CODE]
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(texts[0].encode(), suffix))
    (tmp_path / f"b.py{suffix}").write_bytes(pack(texts[1].encode(), suffix))
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == texts
    assert documents[0].source == str(tmp_path / f"a.txt{suffix}")
    assert report.skipped() == {}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson"])
def test_json_lines_are_one_document_each(tmp_path: Path, name: str, suffix: str) -> None:
    file = tmp_path / (name + suffix)
    file.write_bytes(pack(json_lines(TEXTS), suffix))
    documents, report = read(file)
    assert [d.text for d in documents] == TEXTS
    assert documents[2].source == f"{file}:3"
    assert report.skipped() == {}


def test_json_lines_with_another_key_blank_lines_crlf_and_raw_utf8(tmp_path: Path) -> None:
    lines = [json.dumps({"content": t}, ensure_ascii=False) for t in TEXTS]
    (tmp_path / "x.jsonl").write_bytes("\ufeff".encode() + "\r\n\r\n".join(lines).encode())
    documents, _ = read(tmp_path / "x.jsonl", text_key="content")
    assert [d.text for d in documents] == TEXTS
    assert documents[1].source.endswith("x.jsonl:3")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_rows_are_one_document_each(tmp_path: Path, kind: pa.DataType) -> None:
    file = tmp_path / "x.parquet"
    values = [t.encode() for t in TEXTS] if kind == pa.binary() else TEXTS
    table = pa.table({"text": pa.array(values, kind), "other": list(range(len(TEXTS)))})
    pq.write_table(table, file, row_group_size=4)
    documents, report = read(file)
    assert [d.text for d in documents] == TEXTS
    assert documents[1].source == f"{file}:2"
    assert report.skipped() == {}


def test_folders_are_searched_in_order_and_leave_out_what_is_no_text(tmp_path: Path) -> None:
    for name in ("b/z.md", "b/a.py", "a.txt", "c/README", "Makefile", "b/UPPER.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in (".git/x.txt", "b/__pycache__/y.py", ".hidden.txt", "node_modules/z.js", "skip/w.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no")
    (tmp_path / "pic.png").write_bytes(b"\x89PNG")
    (tmp_path / "lib.so").write_bytes(b"\x7fELF")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    documents, _ = read(tmp_path, exclude=("skip",))
    assert [d.text for d in documents] == ["Makefile", "a.txt", "b/UPPER.TXT", "b/a.py", "b/z.md", "c/README"]
    found = find_sources([tmp_path], ["*/b/*", "sk*"])
    assert [s.path.name for s in found.sources] == ["Makefile", "a.txt", "README"]
    assert found.ignored == {".png": 1, ".so": 1}


def test_globs_and_repeated_inputs(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b.txt", "deep/er/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [d.text for d in read(tmp_path / "a*.txt", tmp_path / "b.txt", tmp_path / "a1.txt")[0]]
    assert names == ["a1.txt", "a2.txt", "b.txt"]
    assert [d.text for d in read(tmp_path / "**/c.txt")[0]] == ["deep/er/c.txt"]
    (tmp_path / "odd[1].txt").write_text("odd")  # an existing file is not taken for a pattern
    assert [d.text for d in read(tmp_path / "odd[1].txt")[0]] == ["odd"]
    (tmp_path / "named.xyz").write_text("any suffix if named directly")
    assert len(read(tmp_path / "named.xyz")[0]) == 1


def test_missing_and_empty_inputs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no input given"):
        find_sources([])
    with pytest.raises(UserError, match=r"nowhere: no such file or folder"):
        find_sources([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"\*\.txt: the glob matches nothing"):
        find_sources([tmp_path / "*.txt"])
    with pytest.raises(UserError, match=r"no text found: looked for \.txt, \.md"):
        find_sources([tmp_path])
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"ignored 1 x \.bin"):
        find_sources([tmp_path])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json: .*one document or many") as caught:
        find_sources([tmp_path / "x.json"])
    assert ".jsonl" in caught.value.do


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl", "x.parquet"])
def test_invalid_utf8_by_policy(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    bad = b"good \xff\xfe and caf\xc3"
    if name == "x.jsonl":
        bad = b'{"text": "one"}\n{"text": "good \xff\xfe and caf\xc3"}\n'
    if name == "x.parquet":
        column = pa.array([b"one", bad]).cast(pa.large_binary()).view(pa.large_string())
        pq.write_table(pa.table({"text": column}), file)
    else:
        file.write_bytes(pack(bad, file.suffix))
    before = ["one"] if name in ("x.jsonl", "x.parquet") else []
    documents, report = read(file)
    assert [d.text for d in documents] == [*before, "good \ufffd\ufffd and caf\ufffd"]
    assert report.skipped() == {"bad_utf8": 1}
    documents, report = read(file, bad_utf8="skip")
    assert [d.text for d in documents] == before
    assert report.skipped() == {"bad_utf8": 1}
    assert "invalid UTF-8 at byte" in report.examples[0]
    byte = len('{"text": "one"}\n{"text": "good ') if name == "x.jsonl" else len("good ")
    with pytest.raises(UserError, match=rf"{name}(:2)?: invalid UTF-8 at byte {byte}\n"):
        read(file, bad_utf8="fail")


def test_malformed_json_lines_are_counted_named_and_skipped(tmp_path: Path) -> None:
    bad = [
        '{"text": "cut',
        "[1, 2]",
        '{"body": "x"}',
        '{"text": null}',
        '{"text": 5}',
        "[" * 100_000,
        "nonsense",
    ]
    good = json_lines(["fine"] * 93).decode().splitlines()
    lines = [*good[:50], *bad, *good[50:]]
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(lines))
    documents, report = read(file)
    assert len(documents) == 93
    assert report.skipped() == {"bad_lines": 7}
    assert [e.removeprefix(f"{file}:").split(":")[0] for e in report.examples] == [
        str(51 + i) for i in range(7)
    ]
    for example, why in zip(
        report.examples,
        [
            "malformed JSON (Unterminated string",
            "not a JSON object but list",
            "no key 'text', only 'body'",
            "'text' is NoneType, not a string",
            "'text' is int",
            "nested too deeply",
            "malformed JSON (Expecting value",
        ],
        strict=True,
    ):
        assert why in example


def test_too_many_bad_lines_stop_the_run_and_name_the_first(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n' * 8 + "x\ny\n")
    with pytest.raises(
        UserError, match=r"x\.jsonl: 2 of 10 lines are unusable, .*10% allowed \(line 9: .*line 10: "
    ):
        read(file)
    assert len(read(file, max_bad=0.2)[0]) == 8
    file.write_text('{"body": "a"}\n')
    with pytest.raises(UserError, match=r"no key 'text', only 'body'") as caught:
        read(file)
    assert "--text-key" in caught.value.do


def test_a_hopeless_file_is_given_up_early(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("x\n" * 100_000)
    with pytest.raises(UserError, match="1000 of 1000 lines are unusable"):
        read(file)


def test_lone_surrogates_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        '{"text": "a\\ud800b\\udc00\\udc00"}\n{"text": "pair \\ud83d\\ude00"}\n'
    )
    documents, report = read(tmp_path / "x.jsonl")
    assert [d.text for d in documents] == ["a\ufffdb\ufffd\ufffd", "pair 😀"]
    assert report.skipped() == {"surrogates": 3}
    assert report.examples == [f"{tmp_path / 'x.jsonl'}:1: lone surrogate"]


def test_empty_documents_and_binary_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "utf16.txt").write_bytes("hello".encode("utf-16"))
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n' + '{"text": "x"}\n' * 10)
    table = pa.table({"text": ["", *["y"] * 20, None]})
    pq.write_table(table, tmp_path / "x.parquet")
    documents, report = read(tmp_path)
    assert {d.text for d in documents} == {"x", "y"}
    assert report.skipped() == {"empty": 4, "bad_lines": 1, "binary": 1}
    assert any("utf16.txt: binary, or not UTF-8" in e for e in report.examples)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("stem", ["x.txt", "x.jsonl"])
def test_damaged_compressed_files_are_refused(tmp_path: Path, stem: str, suffix: str) -> None:
    packed = pack(json_lines([f"{i} {ENGLISH}" for i in range(500)]), suffix)
    file = tmp_path / (stem + suffix)
    for bad in (packed[:-5], packed[: len(packed) // 3], b"not packed at all"):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=rf"{stem}{suffix}: is damaged or not a {suffix} file"):
            read(file)


def test_what_parquet_cannot_give_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), file)
    with pytest.raises(UserError, match=r"no column 'text'; there are 'body', 'n'"):
        read(file)
    with pytest.raises(UserError, match=r"column 'n' holds int64, not text"):
        read(file, text_key="n")
    pq.write_table(pa.table({"text": ["a", None, None]}), file)
    with pytest.raises(UserError, match=r"2 of 3 lines are unusable"):
        read(file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read as parquet"):
        read(file)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("x.parquet", "pyarrow", "parquet"), ("x.txt.zst", "zstandard", "zstd")]
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)  # what Python does for a package that is not installed
    with pytest.raises(UserError, match=f"{name}: needs the package {module}") as caught:
        read(tmp_path / name)
    assert caught.value.do == f'pip install "bigtrain[{extra}]"'
