"""Find the files to read: paths, folders and globs in, a sorted list of readable files out."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bigtrain.errors import UserError

PROSE = "txt text md markdown rst adoc org tex"
CODE = (
    "py pyi pyx c h cc cpp cxx hh hpp hxx cu cuh m mm java kt kts scala groovy gradle js mjs cjs jsx ts tsx "
    "vue go rs rb php pl pm lua r jl swift cs fs fsx vb hs lhs ml mli erl ex exs clj cljs lisp el scm rkt sh "
    "bash zsh fish ps1 bat awk sql proto thrift cmake mk toml yaml yml ini cfg css scss f f90 f95 f03 asm s "
    "v sv vhd vhdl tcl vim dart nim zig d pas ada adb ads lean agda"
)
TEXT_SUFFIXES = frozenset(f".{suffix}" for suffix in f"{PROSE} {CODE}".split())
TEXT_NAMES = frozenset(
    {"README", "LICENSE", "COPYING", "CHANGELOG", "NEWS", "AUTHORS", "Makefile", "Dockerfile"}
)
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PACKED = {".gz": "gz", ".zst": "zst"}
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
LOOKED_FOR = ".txt, .md, source code, .jsonl, .ndjson (each also .gz and .zst) and .parquet"


@dataclass(frozen=True)
class Source:
    """One file to read."""

    path: Path
    kind: Literal["text", "jsonl", "parquet"]
    packed: str
    """"gz", "zst" or "" for plain."""
    size: int
    """Bytes on disk."""


@dataclass
class Found:
    """Files to read, and what was left out."""

    sources: list[Source] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """Files in folders that are not text by their name, counted by suffix."""


def find_sources(inputs: Sequence[str | Path], exclude: Iterable[str] = ()) -> Found:
    """Every file of the inputs, each once, in the order of the inputs and sorted inside folders.

    A folder is searched recursively for known suffixes; hidden entries, `__pycache__`, `node_modules`,
    linked folders and what matches a pattern of `exclude` (against the name or the whole path) are left out.
    A file named directly is read whatever its suffix.
    UserError if an input does not exist, or nothing is found.
    """
    if not inputs:
        raise UserError("no input given", do="name files, folders or globs that hold text")
    patterns = tuple(exclude)
    found = Found()
    seen: set[Path] = set()
    for given in inputs:
        for path in _expand(str(given)):
            files = _walk(path, patterns) if path.is_dir() else iter([path])
            for file in files:
                if (known := file.resolve()) in seen:
                    continue
                seen.add(known)
                source = _classify(file, inside_folder=path.is_dir())
                if source is None:
                    found.ignored[file.suffix or "(no suffix)"] += 1
                else:
                    found.sources.append(source)
    if not found.sources:
        ignored = ", ".join(f"{count} x {suffix}" for suffix, count in found.ignored.most_common(5))
        raise UserError(
            f"no text found: looked for {LOOKED_FOR}" + (f"; ignored {ignored}" if ignored else ""),
            where=", ".join(map(str, inputs)),
            do="name the files directly, or check the path",
        )
    return found


def _expand(given: str) -> list[Path]:
    path = Path(given)
    if path.exists():
        return [path]
    matches = sorted(glob.glob(given, recursive=True)) if glob.has_magic(given) else []
    if not matches:
        what = "the glob matches nothing" if glob.has_magic(given) else "no such file or folder"
        raise UserError(what, where=given, do="check the path (it is relative to the working folder)")
    return [Path(match) for match in matches]


def _walk(folder: Path, exclude: tuple[str, ...]) -> Iterator[Path]:
    def wanted(name: str, parent: str) -> bool:
        path = os.path.join(parent, name)
        hidden = name.startswith(".") or name in SKIPPED_FOLDERS
        return not hidden and not any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(path, p) for p in exclude)

    def refuse(error: OSError) -> None:
        raise UserError(
            f"cannot list the folder: {error.strerror}",
            where=str(error.filename),
            do="check its permissions, or leave it out with --exclude",
        ) from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if wanted(name, parent))
        for name in sorted(files):
            if wanted(name, parent) and os.path.isfile(os.path.join(parent, name)):
                yield Path(parent, name)


def _classify(file: Path, *, inside_folder: bool) -> Source | None:
    packed = PACKED.get(file.suffix.lower(), "")
    inner = file.with_suffix("") if packed else file
    suffix = inner.suffix.lower()
    kind: Literal["text", "jsonl", "parquet"]
    if suffix in JSONL_SUFFIXES:
        kind = "jsonl"
    elif suffix == ".parquet" and not packed:
        kind = "parquet"
    elif suffix == ".json" and not inside_folder:
        raise UserError(
            "a .json file can be one document or many",
            where=str(file),
            do="rename it: .jsonl if every line is an object with the text, .txt to take the file as it is",
        )
    elif not inside_folder or suffix in TEXT_SUFFIXES or inner.name in TEXT_NAMES:
        kind = "text"
    else:
        return None
    return Source(file, kind, packed, file.stat().st_size)
