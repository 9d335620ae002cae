"""Samples over several corpora: every window once an epoch, nothing twice when weights change, lengths in stages."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from bigtrain.budget import BatchSchedule, Length, Progress, rank_samples
from bigtrain.data.blend import Stage
from bigtrain.data.corpus import Corpus
from bigtrain.data.loader import Loader
from bigtrain.data.order import Windows
from bigtrain.data.samples import Samples
from bigtrain.errors import UserError
from bigtrain.model.batch import IGNORE
from tests.data_parts import random_documents, write_corpus

S = 16


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    folder = tmp_path_factory.mktemp("corpora")
    sizes = {"web": 300, "code": 90, "books": 40}
    made = {
        name: write_corpus(folder / name, random_documents(count, 40, seed), shards=2)
        for seed, (name, count) in enumerate(sizes.items())
    }
    return {name: Corpus.open(path) for name, path in made.items()}


def blend(corpora: dict[str, Corpus], *stages: tuple[int, tuple[int, ...], int], seed: int = 5) -> Samples:
    return Samples(corpora, [Stage(s, q) for s, q, _ in stages], [length for *_, length in stages], seed)


def test_one_source_is_read_as_ever(corpora: dict[str, Corpus]) -> None:
    alone = Samples.single(corpora["web"], S, 5)
    windows = Windows(corpora["web"].num_tokens, S, 5)
    assert [alone.origin(g).row[0].start for g in range(500)] == [windows.start_of(g) for g in range(500)]
    blended = blend({k: corpora[k] for k in ("web", "code")}, (0, (1, 0), S), (100, (1, 1), S))
    assert [blended.origin(g) for g in range(100)] == [alone.origin(g) for g in range(100)]


def test_each_window_of_each_source_once_an_epoch_also_when_weights_change(
    corpora: dict[str, Corpus],
) -> None:
    made = blend(corpora, (0, (6, 3, 1), S), (333, (1, 1, 8), S), (500, (4, 4, 0), S))
    origins = [made.origin(g) for g in range(4000)]
    for source in range(3):
        number = made.epoch(source, 0)
        mine = [(o.epoch, o.window) for o in origins if o.source == source]
        assert len(set(mine)) == len(mine)
        counted = Counter(epoch for epoch, _ in mine)
        assert all(counted[epoch] == number for epoch in range(max(counted)))
        assert made.epochs(4000)[source] == pytest.approx(len(mine) / number)
    for start, quotas in ((0, (6, 3, 1)), (500, (4, 4, 0))):
        for first in range(start, start + 80, sum(quotas)):
            counted = Counter(o.source for o in origins[first : first + sum(quotas)])
            assert tuple(counted[i] for i in range(3)) == quotas


def test_a_changed_length_begins_a_new_epoch_of_every_source(corpora: dict[str, Corpus]) -> None:
    made = blend(corpora, (0, (2, 1, 1), S), (200, (2, 1, 1), 2 * S), (300, (1, 1, 0), 2 * S))
    assert [made.length_of(g) for g in (0, 199, 200, 299, 300)] == [S, S, 2 * S, 2 * S, 2 * S]
    for source in (0, 1):
        number = made.epoch(source, 1)
        later = [made.origin(g) for g in range(200, 2000)]
        mine = [(o.epoch, o.window) for o in later if o.source == source]
        assert {o.row[0].size for o in later} == {2 * S}
        assert min(mine)[0] == 0
        counted = Counter(epoch for epoch, _ in mine)
        assert all(counted[epoch] == number for epoch in range(max(counted)))
    read = (
        Counter(made.origin(g).source for g in range(200)),
        Counter(made.origin(g).source for g in range(200, 900)),
    )
    epochs = [[count[i] / made.epoch(i, stage) for i in range(3)] for stage, count in enumerate(read)]
    expected = [sum(both) for both in zip(*epochs, strict=True)]
    assert made.epochs(900) == pytest.approx(expected)


def test_rows_are_the_corpus_at_their_place(corpora: dict[str, Corpus]) -> None:
    made = blend(corpora, (0, (6, 3, 1), S))
    loader = Loader(made, seed=5, document_mask=False)
    batch = loader.batch(range(40, 80))
    for row, sample in enumerate(range(40, 80)):
        ((corpus, start, size),) = made.origin(sample).row
        read = corpus.read(start, size + 1)
        assert batch.tokens[row].tolist() == read[:-1].tolist()
        assert batch.targets[row].tolist() == read[1:].tolist()


def batches(
    made: Samples, schedule: BatchSchedule, ranks: int, microbatch: int, first: int, steps: int
) -> list[torch.Tensor]:
    """The tokens of the global batches of steps first .. steps - 1, in the order of their samples."""
    progress = schedule.ahead(Progress(), first)
    of_ranks = [
        Loader(made, seed=5, prefetch=0).stream(
            rank_samples(schedule, progress, steps, microbatch=microbatch, data_rank=r, data_size=ranks)
        )
        for r in range(ranks)
    ]
    found = []
    for parts in zip(*of_ranks, strict=True):
        tokens = torch.cat([b.tokens for part in parts for b in part])
        ids = torch.cat([b.sample_ids for part in parts for b in part])
        found.append(tokens[ids.argsort()])
    return found


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
def test_global_batches_are_the_same_for_any_ranks_microbatch_and_restart(
    corpora: dict[str, Corpus], ranks: int
) -> None:
    schedule = BatchSchedule(64, 64, 0, S, (Length(64 * 3, 2 * S, 32),))
    made = blend(corpora, (0, (6, 3, 1), S), (64 * 3, (1, 1, 1), 2 * S))
    whole = batches(made, schedule, 1, 8, 0, 6)
    assert [tuple(t.shape) for t in whole] == [(64, S)] * 3 + [(32, 2 * S)] * 3
    for microbatch in {1, 32 // ranks}:
        assert equal(batches(made, schedule, ranks, microbatch, 0, 6), whole)
    for step in (2, 3, 5):  # resumed
        assert equal(batches(made, schedule, ranks, 1, step, 6), whole[step:])


def test_a_run_that_is_resumed_on_8_4_6_and_8_ranks_reads_what_one_reads(corpora: dict[str, Corpus]) -> None:
    schedule = BatchSchedule(24, 24, 0, S)
    made = blend(corpora, (0, (6, 3, 1), S), (70, (1, 1, 1), S))
    whole = batches(made, schedule, 1, 3, 0, 12)
    parts = [(8, 3, 0, 2), (4, 2, 2, 3), (6, 1, 3, 8), (8, 1, 8, 12)]
    assert equal([batch for part in parts for batch in batches(made, schedule, *part)], whole)


def test_held_out_text_in_the_proportions_of_the_first_stage(corpora: dict[str, Corpus]) -> None:
    made = blend(corpora, (0, (6, 3, 1), S))
    rows = made.front_to_back(20)
    counted = Counter(row[0].corpus.where for row in rows)
    assert [counted[c.where] for c in corpora.values()] == [12, 6, 2]
    assert made.front_to_back(10**6) == made.front_to_back(made.in_order)
    every = made.front_to_back(10**6)
    for corpus in corpora.values():
        pieces = [row[0] for row in every if row[0].corpus is corpus]
        assert np.concatenate([corpus.read(p.start, p.size) for p in pieces]).tolist()[
            : corpus.num_tokens - 1
        ] == (corpus.read(0, corpus.num_tokens - 1).tolist())
    poor = blend(corpora, (0, (1, 1, 98), S))  # books are too short for their share
    assert len(poor.front_to_back(made.in_order - 1)) == made.in_order - 1
    targets = [b.targets for b in Loader(made, seed=1).validation_batches(10**6, 8)]
    counted_targets = sum(int((t != IGNORE).sum()) for t in targets)
    documents = 300 + 90 + 40
    assert counted_targets == sum(c.num_tokens for c in corpora.values()) - documents


def test_a_source_shorter_than_a_sequence_is_refused_only_if_it_is_read(corpora: dict[str, Corpus]) -> None:
    long = corpora["books"].num_tokens
    blend(corpora, (0, (1, 1, 1), S), (10, (1, 1, 0), long)).check()
    with pytest.raises(UserError, match="too few for one sequence"):
        blend(corpora, (0, (1, 1, 1), S), (10, (1, 1, 1), long)).check()
