"""Corpora in an object store: a real S3 server, copies that are checked, shared and never stale."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.data import cached
from bigtrain.data.corpus import Corpus
from bigtrain.data.files import write_whole
from bigtrain.data.find import documents_at
from bigtrain.data.loader import Loader
from bigtrain.data.packing import pack_corpus
from bigtrain.data.samples import BestFit, Samples
from bigtrain.errors import RunError, UserError
from tests.data_parts import random_documents, write_corpus


@pytest.fixture
def there(s3: str, tmp_path: Path) -> str:
    """A packed corpus in the store."""
    folder = write_corpus(tmp_path / "made", random_documents(120, 60), shards=3)
    pack_corpus(folder, 32)
    put(folder, s3)
    return s3


def put(folder: Path, url: str) -> None:
    import s3fs

    for file in folder.iterdir():
        s3fs.S3FileSystem().put_file(str(file), f"{url}/{file.name}")


def test_reads_what_the_folder_holds_and_copies_what_is_read(there: str, tmp_path: Path) -> None:
    own, cache = Corpus.open(tmp_path / "made"), tmp_path / "cache"
    corpus = Corpus.open(there, cache=cache)
    assert corpus.folder is not None
    assert sorted(f.name for f in corpus.folder.glob("[a-z]*")) == ["dataset.json", "tokenizer.model"]
    assert corpus.num_tokens == own.num_tokens
    assert corpus.read(0, 10).tolist() == own.read(0, 10).tolist()
    assert [f.name for f in corpus.folder.glob("*.bin")] == ["train-00000.bin"]
    assert corpus.read(0, own.num_tokens).tolist() == own.read(0, own.num_tokens).tolist()
    assert [f[1:] for f in documents_at(corpus, 5, 900)] == [f[1:] for f in documents_at(own, 5, 900)]
    stages = Samples.single(own, 32, 1).blend.stages
    rows = [
        Loader(Samples({"a": c}, stages, [32], 1, cut=BestFit), seed=1).batch([0, 9]) for c in (own, corpus)
    ]
    assert rows[0].tokens.tolist() == rows[1].tokens.tolist()
    again = Corpus.open(there, cache=cache)
    assert again.folder == corpus.folder
    assert there in corpus.where


def test_a_corpus_that_is_prepared_anew_meets_no_old_copies(there: str, tmp_path: Path) -> None:
    old = Corpus.open(there, cache=tmp_path / "cache")
    old.read(0, old.num_tokens)
    put(write_corpus(tmp_path / "new", random_documents(120, 60, seed=9), shards=3), there)
    new = Corpus.open(there, cache=tmp_path / "cache")
    assert new.folder != old.folder
    own = Corpus.open(tmp_path / "new")
    assert new.read(0, own.num_tokens).tolist() == own.read(0, own.num_tokens).tolist()


def test_what_was_altered_or_lost_on_the_way_is_named(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(cached.time, "sleep", lambda seconds: None)
    files = s3fs.S3FileSystem()
    data = bytearray(files.cat_file(f"{there}/train-00001.bin"))
    data[7] ^= 4
    files.pipe_file(f"{there}/train-00001.bin", bytes(data))
    files.pipe_file(f"{there}/train-00002.bin", bytes(data[:-2]))
    files.rm_file(f"{there}/train-00000.bin")
    corpus = Corpus.open(there, cache=tmp_path / "cache")
    for start, why in (
        (0, "FileNotFound"),
        (corpus.num_tokens // 2, "checksum differs"),
        (corpus.num_tokens - 9, "expected"),
    ):
        with pytest.raises(RunError, match=rf"s3://.*train-0000\d.bin: could not be copied.*{why}"):
            corpus.read(start, 5)
    assert not list((tmp_path / "cache").rglob("*.tmp"))
    put(tmp_path / "made", there)
    assert (
        corpus.read(0, corpus.num_tokens).tolist()
        == Corpus.open(tmp_path / "made").read(0, corpus.num_tokens).tolist()
    )


def test_a_store_that_fails_at_first(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached.time, "sleep", lambda seconds: None)
    corpus, tries = Corpus.open(there, cache=tmp_path / "cache"), []
    assert corpus.copies is not None
    real = corpus.copies._store.get_file

    def flaky(*arguments: Any, **options: Any) -> Any:
        tries.append(arguments)
        if len(tries) < 3:
            raise OSError("the line is down")
        return real(*arguments, **options)

    monkeypatch.setattr(corpus.copies._store, "get_file", flaky)
    assert len(corpus.read(0, 5)) == 5
    assert len(tries) == 3


def test_processes_of_a_machine_share_the_copies(there: str, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom bigtrain.data.corpus import Corpus\n"
        "corpus = Corpus.open(sys.argv[1], cache=sys.argv[2])\n"
        "print(corpus.read(0, corpus.num_tokens).sum())\n"
    )
    command = [sys.executable, "-c", program, there, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) for _ in range(3)]
    sums = {process.communicate(timeout=60)[0] for process in processes}
    own = Corpus.open(tmp_path / "made")
    assert sums == {f"{np.sum(own.read(0, own.num_tokens))}\n".encode()}


def test_one_of_many_writes_the_manifest(there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once would take the half-written file from each other."""
    written = []

    def slow(path: Path, data: bytes) -> None:
        written.append(path)
        time.sleep(0.2)
        write_whole(path, data)

    monkeypatch.setattr(cached, "write_whole", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Corpus.open(there, cache=tmp_path / "cache").num_tokens, range(4)))
    assert len(written) == 1
    assert len(set(found)) == 1


def test_urls_that_lead_nowhere(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"s3://.*there is no dataset.json"):
        Corpus.open(f"{s3}/nothing", cache=tmp_path)
    with pytest.raises(UserError, match="give a URL that fsspec knows"):
        Corpus.open("nonsense://x", cache=tmp_path)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="needs the extra `remote`"):
        Corpus.open(s3, cache=tmp_path)
