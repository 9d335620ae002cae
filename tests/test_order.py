"""The order of samples: exact bijections, pure functions, statistics of a fair shuffle."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.order import Permutation, SampleOrder, Windows, mix, mix_array
from bigtrain.errors import UserError

seeds = st.integers(0, 2**63 - 1)


@given(st.integers(1, 3000), seeds)
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_a_bijection_on_both_paths(size: int, seed: int) -> None:
    permutation = Permutation(size, seed)
    image = permutation.array(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))
    some = range(0, size, max(1, size // 50))
    assert [permutation(i) for i in some] == image[list(some)].tolist()


def test_a_permutation_beyond_32_bits_stays_inside_and_injective() -> None:
    size = 10**13
    first = np.arange(size - 5000, size)
    permutation = Permutation(size, 3)
    image = permutation.array(first)
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == len(first)
    assert permutation(int(first[7])) == image[7]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_integer_and_array_mixing_agree(words: list[int]) -> None:
    assert [mix(word) for word in words] == mix_array(np.array(words, np.uint64)).tolist()


def test_small_permutations_are_all_reached_equally_often() -> None:
    seen = Counter(tuple(Permutation(4, seed)(i) for i in range(4)) for seed in range(4800))
    assert len(seen) == 24
    chi2 = sum((count - 200) ** 2 / 200 for count in seen.values())
    assert chi2 < 50  # 23 degrees of freedom: 49.7 is the 0.1 % point


def test_a_large_permutation_looks_shuffled() -> None:
    size = 200_000
    image = Permutation(size, 11).array(np.arange(size))
    cells, _, _ = np.histogram2d(np.arange(size), image, bins=40)
    expected = size / 1600
    assert ((cells - expected) ** 2 / expected).sum() / 1521 < 1.15
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.01
    assert (np.abs(np.diff(image)) == 1).sum() < 15  # 2 expected


@given(st.integers(1, 500), seeds, st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_every_window_once_an_epoch(windows: int, seed: int, epoch: int) -> None:
    order = SampleOrder(windows, seed)
    samples = range(epoch * windows, (epoch + 1) * windows)
    visited = [order.window_of(g) for g in samples]
    assert sorted(visited) == [(epoch, window) for window in range(windows)]
    assert [order.window_of(g) for g in reversed(samples)] == visited[::-1]


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = SampleOrder(1000, seed)
        return [order.window_of(number * 1000 + i)[1] for i in range(1000)]

    orders = [epoch(1, 0), epoch(1, 1), epoch(1, 2), epoch(2, 0)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 10  # 1 expected


def test_the_order_never_changes_between_versions() -> None:
    """A resumed run must see the order it began with: these numbers are part of the format."""
    assert [Permutation(1000, 7)(i) for i in range(6)] == [856, 870, 962, 982, 109, 124]
    starts = [Windows(100_000, 256, 1).start_of(g) for g in (0, 1, 2, 389, 10_000)]
    assert starts == [87009, 93665, 52705, 12980, 13809]


@given(st.integers(9, 3000), st.integers(1, 8), seeds)
@settings(max_examples=80, deadline=None)
def test_windows_stay_inside_and_do_not_overlap(tokens: int, length: int, seed: int) -> None:
    windows = Windows(tokens, length, seed)
    assert windows.num_windows >= max(1, (tokens - 1) // length - 1)
    for epoch in range(3):
        samples = range(epoch * windows.num_windows, (epoch + 1) * windows.num_windows)
        starts = sorted(windows.start_of(g) for g in samples)
        assert starts[0] >= 0
        assert starts[-1] + length + 1 <= tokens
        assert all(b - a == length for a, b in pairwise(starts))


def test_offsets_differ_between_epochs() -> None:
    offsets = {Windows(100_000, 256, 1).offset(epoch) for epoch in range(50)}
    assert len(offsets) > 35
    assert max(offsets) < 256


def test_too_few_tokens() -> None:
    assert Windows(17, 16, 0).start_of(123) == 0
    with pytest.raises(UserError, match=r"corpus/x: 16 tokens are too few for one sequence of 16 \+ 1"):
        Windows(16, 16, 0, where="corpus/x")
