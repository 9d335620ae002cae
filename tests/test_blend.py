"""Blends: quotas to the sample, prefixes that never change, sources that reach their limit."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.data.blend import BLOCK, LARGEST_BLOCK, Blend, Stage, quotas, within_limits

weights = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any)


def sources_of(blend: Blend, first: int, last: int) -> list[int]:
    return [blend.place(g)[0] for g in range(first, last)]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40).filter(lambda w: max(w) > 0))
def test_quotas_are_the_nearest_whole_numbers(given: list[float]) -> None:
    try:
        found = quotas(given)
    except ValueError:
        smallest = min(Fraction(w) for w in given if w > 0)
        assert smallest * LARGEST_BLOCK / sum(map(Fraction, given)) < 1
        return
    block = sum(found)
    assert block >= BLOCK
    assert block & (block - 1) == 0
    for n, weight in zip(found, given, strict=True):
        assert abs(n - Fraction(weight) * block / sum(map(Fraction, given))) < 1
        assert (n > 0) == (weight > 0)


def test_a_rare_source_makes_the_block_larger_and_an_absurd_one_is_refused() -> None:
    assert quotas([1, 1e-5]) == (65535, 1)
    with pytest.raises(ValueError, match="factor"):
        quotas([1, 1e-9])
    for bad in ([0.0, 0.0], [1.0, -0.1]):
        with pytest.raises(ValueError, match="above 0"):
            quotas(bad)
    assert len(quotas([1] * 10_000)) == 10_000


@given(weights, st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_every_block_has_the_quotas_and_no_sample_of_a_source_comes_twice(
    given: list[int], seed: int
) -> None:
    stage = Stage(0, tuple(given))  # a small block
    blend = Blend([stage], seed)
    places = [blend.place(g) for g in range(5 * stage.block)]
    for block in range(5):
        here = Counter(source for source, _ in places[block * stage.block : (block + 1) * stage.block])
        assert [here[i] for i in range(len(given))] == given
    for source, quota in enumerate(given):
        assert [ordinal for s, ordinal in places if s == source] == list(range(5 * quota))
    for n in (0, 1, stage.block - 1, stage.block, 3 * stage.block + stage.block // 2):
        counted = Counter(source for source, _ in places[:n])
        assert blend.consumed(n).tolist() == [counted[i] for i in range(len(given))]


def test_a_large_block_is_shuffled() -> None:
    sources = np.array(sources_of(Blend([Stage(0, quotas([1, 1]))], 3), 0, BLOCK)) * 2 - 1
    assert abs(np.corrcoef(sources[:-1], sources[1:])[0, 1]) < 0.05  # 1/sqrt(8192) is 0.011
    assert abs(sources.reshape(16, -1).sum(1)).max() < 4.5 * 512**0.5


@given(weights, st.data())
@settings(max_examples=20, deadline=None)
def test_a_stage_added_later_changes_nothing_before_it_and_repeats_nothing(
    first: list[int], data: st.DataObject
) -> None:
    second = data.draw(st.lists(st.integers(0, 50), min_size=len(first), max_size=len(first)).filter(any))
    start = data.draw(st.integers(1, 400))  # also in the middle of a block
    alone, staged = (
        Blend([Stage(0, tuple(first))], 5),
        Blend([Stage(0, tuple(first)), Stage(start, tuple(second))], 5),
    )
    assert [alone.place(g) for g in range(start)] == [staged.place(g) for g in range(start)]
    end = start + 2 * sum(second)
    places = [staged.place(g) for g in range(end)]
    for source in range(len(first)):
        ordinals = [ordinal for s, ordinal in places if s == source]
        assert ordinals == list(range(len(ordinals)))
    later = Counter(source for source, _ in places[start:])
    assert [later[i] for i in range(len(first))] == [2 * n for n in second]


def test_a_block_is_the_same_wherever_it_is_asked_from() -> None:
    blend = Blend([Stage(0, quotas([3, 2, 1])), Stage(20_000, quotas([1, 0, 5]))], 9)
    asked = [10**15, 5, 19_999, 20_000, 8191, 8192, 10**12, 5]
    assert [blend.place(g) for g in asked] == [Blend(blend.stages, 9).place(g) for g in asked]
    assert blend.stage_of(19_999) == 0
    assert blend.stage_of(20_000) == 1


@given(weights, st.data())
@settings(max_examples=25, deadline=None)
def test_a_source_at_its_limit_gives_exactly_that_much_and_its_share_goes_to_the_others(
    given: list[int], data: st.DataObject
) -> None:
    limits = data.draw(st.lists(st.none() | st.integers(0, 20_000), min_size=len(given), max_size=len(given)))
    stages, end = within_limits([(0, given, limits)], 7)
    read = [i for i, weight in enumerate(given) if weight]
    if any(limits[i] is None for i in read):
        assert end is None
    else:
        assert end == sum(limits[i] or 0 for i in read)
        if end == 0:
            assert stages == []
            return
    blend = Blend(stages, 7)
    consumed = blend.consumed(end if end is not None else 10**9)
    for i, limit in enumerate(limits):
        if not given[i]:
            assert consumed[i] == 0
        elif limit is not None:
            assert consumed[i] == limit
    last = [w if limits[i] is None else 0 for i, w in enumerate(given)]
    if any(last):
        assert stages[-1].quotas == quotas(last)


def test_a_source_that_may_give_nothing() -> None:
    """It was 0 of 0, seen once among the examples above."""
    assert within_limits([(0, [1, 0], [5, 0])], 7)[1] == 5
    stages, end = within_limits([(0, [1, 1], [5, 0])], 7)
    assert (end, [stage.quotas[1] for stage in stages]) == (5, [0])


def test_limits_hold_over_stages_of_different_lengths() -> None:
    # Half an epoch (of 100) is read first; then sequences are twice as long, and an epoch has 50 of them.
    stages, end = within_limits([(0, [1, 1], [100, None]), (100, [1, 1], [50, None])], 1)
    blend = Blend(stages, 1)
    first = int(blend.consumed(100)[0])
    rest = int(blend.consumed(10**7)[0]) - first
    assert end is None
    assert first + 2 * rest in (99, 100)
    assert stages[-1].quotas == quotas([0, 1])


def test_a_source_that_ends_before_the_next_stage() -> None:
    stages, end = within_limits([(0, [1], [30]), (100, [1], [30])], 1)
    assert end == 30
    assert [stage.start for stage in stages] == [0]
