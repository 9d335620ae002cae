"""MinHash against the Jaccard index itself."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from bigtrain.data.minhash import MOST, SHINGLE, bands, bands_and_rows, shingles, signature
from tests.data_parts import CHINESE, CODE, texts


def jaccard(a: str, b: str) -> float:
    """Of the sets of stretches, the slow way."""
    return len(stretches(a) & stretches(b)) / len(stretches(a) | stretches(b))


@functools.cache
def stretches(text: str) -> frozenset[str]:
    plain = " ".join(text.casefold().split())
    return frozenset(plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1)))


def edited(text: str, share: float, seed: int) -> str:
    dice = random.Random(seed)
    return "".join(dice.choice("abcxyz世界 ") if dice.random() < share else letter for letter in text)


@pytest.mark.parametrize("text", [*texts()[:3], CODE * 5, CHINESE * 4 + "不同的句子在这里。" * 3])
def test_equal_numbers_estimate_the_jaccard_index(text: str) -> None:
    for share in (0.0, 0.005, 0.02, 0.1):
        other = edited(text, share, 1)
        expected = jaccard(text, other)
        found = (signature(text) == signature(other)).mean()
        # A binomial share of 128: four standard deviations, and a little for orders that are only linear.
        assert abs(found - expected) < 4 * (expected * (1 - expected) / MOST) ** 0.5 + 0.05, (share, expected)


def test_case_and_white_space_do_not_count_and_any_text_has_a_signature() -> None:
    assert (signature("Some TEXT\n\n here") == signature("some text here  ")).all()
    assert len(shingles("")) == 0
    assert (signature("") == 2**32 - 1).all()
    assert len(shingles("abc")) == 1
    assert (signature("abc") != signature("abd")).any()
    assert len(set(shingles("x" * 50).tolist())) == 1
    assert len(set(shingles("abcdefghijkl").tolist())) == 5
    long = "".join(random.Random(3).choices("abcdefgh", k=10_000))  # several chunks
    assert (
        signature(long) == np.minimum(signature(long[:6000]), signature(long[6000 - SHINGLE + 1 :]))
    ).all()


def test_signatures_never_change_between_versions() -> None:
    """An interrupted preparation goes on with signs that another version may have written."""
    assert signature("The quick brown fox", 3).tolist() == [167241348, 45121315, 289171508]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_pairs_from_the_threshold_on(threshold: float) -> None:
    b, r = bands_and_rows(threshold)
    assert b * r <= MOST
    found = lambda s: 1 - (1 - s**r) ** b  # noqa: E731
    assert found(threshold + 0.1 * (1 - threshold)) > 0.6
    assert found(threshold / 2) < 0.15
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2**32, (1, b * r)).astype(np.uint32)
    other = one.copy()
    other[0, r : b * r] += 1
    equal = bands(one, b, r) == bands(other, b, r)
    assert equal.tolist() == [[True] + [False] * (b - 1)]
