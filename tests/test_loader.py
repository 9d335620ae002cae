"""Batches: right targets and boundaries, pure functions of sample numbers, errors that reach the consumer."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bigtrain.data.corpus import Corpus
from bigtrain.data.loader import Loader
from bigtrain.data.order import Windows
from bigtrain.data.prefetch import Prefetch
from bigtrain.data.samples import Samples
from bigtrain.errors import RunError, UserError
from bigtrain.model.batch import IGNORE, Batch
from tests.data_parts import random_documents, small_tokenizer, write_corpus

S = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return Corpus.open(write_corpus(folder, random_documents(300, 60), shards=3))


def loader(corpus: Corpus, **options: object) -> Loader:
    length, seed = int(options.pop("sequence_length", S)), int(options.pop("seed", 5))  # type: ignore[call-overload]
    return Loader(Samples.single(corpus, length, seed), seed=seed, **options)  # type: ignore[arg-type]


def windows_of(made: Loader) -> Windows:
    return Windows(made.corpus.num_tokens, made.samples.lengths[0], made.seed)


def masked(corpus: Corpus, **options: object) -> Loader:
    return loader(corpus, objective="masked", mask_id=4, **options)


def same(a: Batch, b: Batch) -> bool:
    fields = ("tokens", "targets", "cu_seqlens", "sample_ids")
    pairs = [(getattr(a, name), getattr(b, name)) for name in fields]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def threads() -> int:
    return sum(thread.name == "bigtrain-data" for thread in threading.enumerate())


def test_tokens_and_targets_are_the_corpus_shifted_by_one(corpus: Corpus) -> None:
    made = loader(corpus, document_mask=False)
    batch = made.batch([3, 700, 12])
    assert batch.cu_seqlens is None
    assert batch.sample_ids.tolist() == [3, 700, 12]
    assert batch.counted() == 3 * S
    everything = corpus.read(0, corpus.num_tokens)
    for row, sample in enumerate((3, 700, 12)):
        start = windows_of(made).start_of(sample)
        assert batch.tokens[row].tolist() == everything[start : start + S].tolist()
        assert batch.targets[row].tolist() == everything[start + 1 : start + S + 1].tolist()
    assert {t.dtype for t in (batch.tokens, batch.targets, batch.sample_ids)} == {torch.int64}


def test_document_mask_marks_every_boundary_and_ignores_the_target_across_it(corpus: Corpus) -> None:
    batch = loader(corpus).batch(list(range(20)))
    flat, targets = batch.tokens.flatten().tolist(), batch.targets.flatten().tolist()
    assert batch.cu_seqlens is not None
    expected = [0]
    for i, token in enumerate(flat):
        assert (targets[i] == IGNORE) == (token == corpus.eos_id)
        if token == corpus.eos_id or (i + 1) % S == 0:
            expected.append(i + 1)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == expected
    assert len(expected) > 21


@pytest.mark.parametrize("make", [loader, masked])
def test_a_row_does_not_depend_on_its_batch(corpus: Corpus, make: object) -> None:
    ids = [0, 5, 9, 400, 401, 10**9, 7, 2]
    whole = make(corpus).batch(ids)  # type: ignore[operator]
    for split in ([1] * 8, [3, 5], [8], [2, 2, 2, 2]):
        fresh, parts, done = make(corpus), [], 0  # type: ignore[operator]
        for size in split:
            parts.append(fresh.batch(ids[done : done + size]))
            done += size
        assert torch.equal(torch.cat([p.tokens for p in parts]), whole.tokens)
        assert torch.equal(torch.cat([p.targets for p in parts]), whole.targets)
    other = make(corpus, seed=6).batch(ids)  # type: ignore[operator]
    assert not torch.equal(other.tokens, whole.tokens)


def test_one_epoch_predicts_each_token_at_most_once_and_nearly_all(corpus: Corpus) -> None:
    made = loader(corpus, document_mask=False)
    starts = [windows_of(made).start_of(g) for g in range(windows_of(made).num_windows)]
    predicted = np.zeros(corpus.num_tokens, int)
    for start in starts:
        predicted[start + 1 : start + S + 1] += 1
    assert predicted.max() == 1
    assert (predicted == 0).sum() <= 2 * S


def test_a_document_longer_than_a_sequence_is_read_in_parts_and_nothing_of_it_is_lost(tmp_path: Path) -> None:
    document = np.concatenate([[1], np.arange(10, 10 + 20 * S) % 200 + 20, [2]])
    corpus = Corpus.open(write_corpus(tmp_path, [document.astype(np.int32)]))
    assert corpus.longest == len(document)
    batches = list(loader(corpus).validation_batches(100, 1))
    targets = torch.cat([b.targets.flatten() for b in batches])
    assert targets[targets != IGNORE].tolist() == document[1:].tolist()
    assert all(len(b.cu_seqlens) <= 3 for b in batches if b.cu_seqlens is not None)


def test_stream_equals_batches_whatever_the_read_ahead_and_the_restart(corpus: Corpus) -> None:
    plan = [[[4 * i, 4 * i + 1], [4 * i + 2, 4 * i + 3]] for i in range(12)]
    wanted = [[loader(corpus).batch(ids) for ids in step] for step in plan]
    for prefetch in (0, 1, 4):
        for first in (0, 7):
            made = loader(corpus, prefetch=prefetch)
            got = list(made.stream(plan[first:]))
            assert len(got) == 12 - first
            for step, expected in zip(got, wanted[first:], strict=True):
                assert all(same(a, b) for a, b in zip(step, expected, strict=True))
            made.close()
    assert threads() == 0


def test_close_stops_an_endless_stream_at_once(corpus: Corpus) -> None:
    def endless() -> Iterator[list[list[int]]]:
        g = 0
        while True:
            yield [[g]]
            g += 1

    made = loader(corpus, prefetch=2)
    stream = made.stream(endless())
    assert next(stream)[0].sample_ids.tolist() == [0]
    assert threads() == 1
    began = time.monotonic()
    made.close()
    made.close()
    assert time.monotonic() - began < 2
    assert threads() == 0
    assert list(stream) == []
    again = made.stream(endless())
    assert next(again)[0].sample_ids.tolist() == [0]
    made.stream([])  # closes the one before
    made.close()
    assert threads() == 0


def test_one_can_wait_for_data_for_a_while_only(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        gate.wait()
        yield 1

    reader = Prefetch(items(), 2)
    assert reader.ready(10.0)
    assert next(reader) == 0
    assert not reader.ready(0.05)
    monkeypatch.setattr("bigtrain.data.prefetch.CLOSING", 0.1)
    reader.close()
    assert "has not come back for 0.1 s" in caplog.text
    assert reader.ready(0.0), "it says at once that there is nothing more"
    gate.set()
    assert list(reader) == []


def test_waiting_takes_nothing_away() -> None:
    reader = Prefetch(iter([None, 1]), 1)
    assert [reader.ready(10.0) and next(reader) for _ in range(2)] == [None, 1]
    assert reader.ready(10.0)
    assert list(reader) == []


def test_a_forgotten_reader_ends_its_thread() -> None:
    reader = Prefetch(iter(range(10**9)), 2)
    assert next(reader) == 0
    del reader
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_damaged_shard_is_named_with_the_samples(tmp_path: Path, prefetch: int) -> None:
    folder = write_corpus(tmp_path, random_documents(50, 60))
    damaged = folder / "train-00000.bin"
    data = np.fromfile(damaged, np.uint16)
    data[-40:] = 60000
    made = loader(Corpus.open(folder), prefetch=prefetch)
    data.tofile(damaged)
    windows = windows_of(made).num_windows
    with pytest.raises(UserError, match=r"train-00000\.bin: token id 60000 .*\(samples \d+\)") as caught:
        list(made.stream([[g]] for g in range(2 * windows)))
    assert caught.value.do
    made.close()
    assert threads() == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_any_other_error_is_raised_in_the_consumer_after_what_came_before(
    corpus: Corpus, prefetch: int
) -> None:
    stream = loader(corpus, prefetch=prefetch).stream([[[1]], [[2], ["x"]]])  # type: ignore[list-item]
    assert next(stream)[0].sample_ids.tolist() == [1]
    with pytest.raises(RunError, match=r"could not read samples x: TypeError"):
        next(stream)
    assert threads() == 0


def test_an_error_of_the_plan_is_raised_too(corpus: Corpus) -> None:
    def plan() -> Iterator[list[list[int]]]:
        yield [[0]]
        raise KeyError("the plan broke")

    stream = loader(corpus, prefetch=1).stream(plan())
    next(stream)
    with pytest.raises(KeyError, match="the plan broke"):
        next(stream)
    assert list(stream) == []


def test_masking_follows_bert(corpus: Corpus) -> None:
    made, plain = masked(corpus), loader(corpus, document_mask=False)
    ids = list(range(600))
    hidden, true = made.batch(ids), plain.batch(ids)
    chosen = hidden.targets != IGNORE
    assert torch.equal(hidden.targets[chosen], true.tokens[chosen])
    assert torch.equal(hidden.tokens[~chosen], true.tokens[~chosen])
    special = torch.tensor(small_tokenizer().special_ids)
    assert not torch.isin(hidden.targets[chosen], special).any()
    ordinary = ~torch.isin(true.tokens, special)
    share = chosen.sum() / ordinary.sum()
    assert abs(share - 0.15) < 0.01  # standard error 0.0026
    now = hidden.tokens[chosen]
    was = hidden.targets[chosen]
    assert abs((now == 4).float().mean() - 0.8) < 0.03
    assert abs((now == was).float().mean() - 0.1) < 0.03
    replaced = now[(now != 4) & (now != was)]
    assert not torch.isin(replaced, special).any()
    assert len(set(replaced.tolist())) > 100
    assert hidden.cu_seqlens is not None
    assert hidden.cu_seqlens.tolist() == loader(corpus).batch(ids).cu_seqlens.tolist()  # type: ignore[union-attr]


def test_masking_chooses_at_least_one_token_and_none_where_there_is_none(tmp_path: Path) -> None:
    documents = [np.array([1, 2], np.int32)] * 40 + [np.array([1, 9, 2], np.int32)] * 40
    made = masked(Corpus.open(write_corpus(tmp_path, documents)), sequence_length=8, mask_rate=0.001)
    batch = made.batch(range(windows_of(made).num_windows))
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
        assert ((targets != IGNORE).sum() > 0) == bool((tokens > 4).any() or (tokens == 4).any())


def test_validation_covers_every_token_once_for_any_number_of_ranks(corpus: Corpus) -> None:
    made = loader(corpus, document_mask=False)
    everything = corpus.read(0, corpus.num_tokens)
    count = made.validation_windows()
    assert count == -(-(corpus.num_tokens - 1) // S)
    for ranks in (1, 2, 3):
        lists = [list(made.validation_batches(10**6, 4, rank=r, ranks=ranks)) for r in range(ranks)]
        assert len({len(batches) for batches in lists}) == 1
        rows: dict[int, list[int]] = {}
        for batch in (b for batches in lists for b in batches):
            assert batch.tokens.shape == (4, S)
            for number, targets in zip(batch.sample_ids.tolist(), batch.targets, strict=True):
                assert number not in rows
                rows[number] = targets[targets != IGNORE].tolist()
        predicted = [t for number in sorted(rows) for t in rows[number]]
        assert predicted == everything[1:].tolist()
    few = list(made.validation_batches(6, 4))
    assert sum(b.counted() for b in few) == 6 * S


def test_validation_shorter_than_one_sequence_is_padded(tmp_path: Path) -> None:
    corpus = Corpus.open(write_corpus(tmp_path, [np.array([1, 10, 11, 2, 1, 12, 2], np.int32)]))
    (batch,) = loader(corpus, sequence_length=10).validation_batches(64, 2)
    assert batch.tokens.tolist() == [[1, 10, 11, 2, 1, 12, 2, 0, 0, 0], [0] * 10]
    assert batch.targets[0].tolist() == [10, 11, 2, IGNORE, 12, 2, *[IGNORE] * 4]
    assert batch.targets[1].tolist() == [IGNORE] * 10
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 10, 20]
    (hidden,) = masked(corpus, sequence_length=10).validation_batches(64, 1)
    assert (hidden.targets[0][7:] == IGNORE).all()
    assert hidden.counted() >= 1


def test_what_does_not_fit_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size 500 is smaller than the tokenizer's 512"):
        loader(corpus, vocab_size=500)
    with pytest.raises(UserError, match="<mask>"):
        loader(corpus, objective="masked")
    with pytest.raises(UserError, match="too few"):
        loader(corpus, sequence_length=corpus.num_tokens).stream([])
    empty = Corpus.open(write_corpus(tmp_path, random_documents(2, 5)), "validation")
    with pytest.raises(UserError, match=r"\(validation\): there is nothing to evaluate on"):
        next(loader(empty).validation_batches(4, 2))
