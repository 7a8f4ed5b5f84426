"""Scores by group of test images, such as regions of the world, and the group that is served worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from explora.errors import DataError
from explora.evaluation.base import DRAWS, interval, paired

LEAST = 10
"""Images that a group needs to be called the worst."""


class GroupScore(NamedTuple):
    """A mean over the `n` test images of one group, in percent, with its 95 % bootstrap interval."""

    name: str
    n: int
    value: float
    low: float
    high: float


def by_group(scores: np.ndarray, groups: np.ndarray, names: Sequence[str]) -> list[GroupScore]:
    """Mean score of each group that has images, in the order of `names`.

    Takes scores (N,) in [0, 1] and the group number (N,) of each image; images without a group (-1) are in none.

    Raises:
        DataError: not one group number for each score.
    """
    found = []
    for name, members in _members(groups, names, len(scores)).items():
        own = np.asarray(scores, np.float64)[members]
        found.append(GroupScore(name, len(own), 100 * float(own.mean()), *interval(own)))
    return found


def worst(found: Sequence[GroupScore], least: int = LEAST) -> GroupScore | None:
    """The group of the lowest mean among those of at least `least` images, the first of equals; None without such.

    Source: Koh et al. 2021 (WILDS), worst-region accuracy: the plain share of right answers within a region.
    """
    return min((group for group in found if group.n >= least), key=lambda group: group.value, default=None)


def too_small(found: Sequence[GroupScore], least: int = LEAST) -> str:
    """Says which groups `worst` did not look at; empty if it saw them all."""
    small = [f"{group.name} ({group.n})" for group in found if group.n < least]
    return f"too few images to be called the worst, below {least}: {', '.join(small)}" if small else ""


def paired_by_group(
    scores_a: np.ndarray, scores_b: np.ndarray, groups: np.ndarray, names: Sequence[str]
) -> dict[str, tuple[float, float, float]]:
    """`paired` within each group that has images, by name.

    Raises:
        DataError: not one group number and one score of each model for each image.
    """
    members = _members(groups, names, len(scores_a), len(scores_b))
    return {name: paired(scores_a[own], scores_b[own]) for name, own in members.items()}


def paired_worst(
    scores_a: np.ndarray, scores_b: np.ndarray, groups: np.ndarray, names: Sequence[str], least: int = LEAST
) -> tuple[float, float, float] | None:
    """Worst-group mean of a minus that of b, in percent points, with its 95 % bootstrap interval.

    Each model has its own worst group, as in WILDS; the two need not be the same. A difference on the group that is
    worst for a would count its bad luck there against it alone. Each draw takes images anew within every group, the
    same for both models, and then looks for both worst groups again. None where no group has `least` images.

    Raises:
        DataError: not one group number and one score of each model for each image.
    """
    large = _members(groups, names, len(scores_a), len(scores_b), least=least).values()
    pairs = [np.stack([scores_a[own], scores_b[own]]).astype(np.float64) for own in large]
    if not pairs:
        return None
    rng = np.random.default_rng(0)
    means = np.array([_means(pair, rng) for pair in pairs])
    a, b = np.min([pair.mean(axis=1) for pair in pairs], axis=0)
    drawn = means.min(axis=0)
    low, high = 100 * np.percentile(drawn[:, 0] - drawn[:, 1], [2.5, 97.5])
    return 100 * float(a - b), float(low), float(high)


def _means(pair: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means (draws, 2) of both rows of a pair (2, n) over images drawn with replacement."""
    n = pair.shape[1]
    return np.array([pair[:, rng.integers(0, n, n)].mean(axis=1) for _ in range(DRAWS)])


def members(groups: np.ndarray, names: Sequence[str], least: int = LEAST) -> dict[str, np.ndarray]:
    """Where in group numbers (N,) the images of each group are, by name, of groups that have `least` of them."""
    places = {name: np.flatnonzero(groups == number) for number, name in enumerate(names)}
    return {name: own for name, own in places.items() if len(own) >= least}


def _members(groups: np.ndarray, names: Sequence[str], *scores: int, least: int = 1) -> dict[str, np.ndarray]:
    """`members` of images that have so many scores."""
    if set(scores) != {len(groups)}:
        raise DataError(f"{' and '.join(map(str, scores))} scores, but {len(groups)} images with group numbers")
    return members(groups, names, least)
