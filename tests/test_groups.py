"""Scores by group against loops, the worst group, its paired difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from explora.errors import DataError
from explora.evaluation.base import interval, paired
from explora.evaluation.groups import by_group, paired_by_group, paired_worst, too_small, worst

NAMES = ["asia", "europe", "empty", "island"]


def images(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 60 images right with 90 % in asia, 40 with 50 % in europe, 5 never on an island, 7 nowhere."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.random(60) < 0.9, rng.random(40) < 0.5, np.zeros(5), np.ones(7)]).astype(float)
    groups = np.repeat([0, 1, 3, -1], [60, 40, 5, 7])
    order = rng.permutation(len(scores))
    return scores[order], groups[order]


def test_groups_are_means_of_their_images() -> None:
    scores, groups = images()
    found = by_group(scores, groups, NAMES)
    assert [group.name for group in found] == ["asia", "europe", "island"]
    for group in found:
        own = [s for s, g in zip(scores, groups, strict=True) if NAMES[g] == group.name and g >= 0]
        assert (group.n, group.value) == (len(own), pytest.approx(100 * sum(own) / len(own)))
        assert (group.low, group.high) == interval(np.array(own))
    assert sum(group.n for group in found) == len(scores) - 7


def test_interval_of_a_group_is_near_the_normal_one() -> None:
    scores, groups = images()
    europe = by_group(scores, groups, NAMES)[1]
    p = europe.value / 100
    half = 196 * math.sqrt(p * (1 - p) / europe.n)
    assert (europe.low, europe.high) == pytest.approx((europe.value - half, europe.value + half), abs=2.6)


def test_worst_group() -> None:
    found = by_group(*images(), NAMES)
    chosen = worst(found)
    assert chosen is not None
    assert chosen.name == "europe"
    assert too_small(found) == "too few images to be called the worst, below 10: island (5)"
    alone = worst(found, least=5)
    assert alone is not None
    assert (alone.name, alone.value, too_small(found, least=5)) == ("island", 0, "")
    assert worst(found, least=100) is None


def test_each_model_has_its_own_worst_group() -> None:
    groups = np.repeat([0, 1], 100)
    a = np.concatenate([np.arange(100) < 40, np.arange(100) < 90])  # 40 % in asia
    b = np.concatenate([np.arange(100) < 80, np.arange(100) < 30])  # 30 % in europe
    found = paired_worst(a, b, groups, NAMES)
    assert found is not None
    difference, low, high = found
    assert difference == pytest.approx(10)
    # two shares of 100 images each, independent of one another
    half = 196 * math.sqrt((0.4 * 0.6 + 0.3 * 0.7) / 100)
    assert (low, high) == pytest.approx((10 - half, 10 + half), abs=1.5)
    each = paired_by_group(a, b, groups, NAMES)
    assert [each[name][0] for name in NAMES[:2]] == pytest.approx([-40, 60])


def test_the_same_images_are_drawn_for_both() -> None:
    scores, groups = images()
    assert paired_worst(scores, scores, groups, NAMES) == (0, 0, 0)
    one_better = scores.copy()
    one_better[np.flatnonzero((groups == 1) & (scores == 0))[:4]] = 1
    found = paired_worst(one_better, scores, groups, NAMES)
    own = groups == 1
    assert found is not None
    assert found == pytest.approx(paired(one_better[own], scores[own]), abs=1.5)
    assert found[0] == pytest.approx(10)
    assert paired_by_group(one_better, scores, groups, NAMES)["europe"] == paired(one_better[own], scores[own])
    assert paired_worst(scores, scores, groups, NAMES, least=100) is None


def test_the_worst_group_is_found_anew_in_each_draw() -> None:
    """Two groups of one accuracy: the worse of two draws is below it, so an interval of one group would be wrong."""
    groups = np.repeat([0, 1], 50)
    a = np.tile(np.arange(50) < 25, 2)
    found = paired_worst(a, np.ones(100), groups, NAMES)
    assert found is not None
    difference, _, high = found
    assert difference == pytest.approx(-50)
    # both are above what one of them is above with the root of 2.5 %
    worse_of_two = stats.binom.isf(math.sqrt(0.025), 50, 0.5) / 50
    assert high == pytest.approx(100 * worse_of_two - 100, abs=2)
    assert high < interval(a[:50])[1] - 100


def test_numbers_that_do_not_fit_are_refused() -> None:
    scores, groups = images()
    with pytest.raises(DataError, match="111 scores, but 112 images"):
        by_group(scores[1:], groups, NAMES)
    for pair in ((scores[1:], scores), (scores, scores[1:])):
        with pytest.raises(DataError, match="scores, but 112 images"):
            paired_worst(*pair, groups, NAMES)
        with pytest.raises(DataError, match="scores, but 112 images"):
            paired_by_group(*pair, groups, NAMES)
