"""Several sets of images drawn from with weights, in an order that can be reached at any place."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from explora.bands import Pixels
from explora.data.order import BalancedEpochs, Epochs, Order, apportioned
from explora.data.shards.index import ShardSet
from explora.data.views import STEP, Key
from explora.errors import ConfigError

CYCLE = 1024
"""Draws in which every set has its exact share."""
_DRAWS = STEP + 2
"""A number beyond any view and that of the blocks, see `order`."""


class Mixture:
    """Sets of which each gives its share of every 1024 images, from epochs of its own.

    Images are numbered through all sets, in their order. An epoch of the mixture is as many images as it has; by
    then a set with a large weight has begun again, and one with a small weight is not through.

    Args:
        weights: shares of the sets, in any unit; their numbers of images when left out, so that all are through at
            about the same time.

    Raises:
        ConfigError: there is no set, not one weight above 0 for each, or one that comes to less than one draw in 1024.
    """

    def __init__(self, sets: Sequence[ShardSet], weights: Sequence[float] | None = None) -> None:
        if not sets:
            raise ConfigError("a mixture needs at least one set of shards")
        given = [float(len(one)) for one in sets] if weights is None else [float(weight) for weight in weights]
        if len(given) != len(sets) or not all(0 < weight < math.inf for weight in given):
            raise ConfigError(f"weights {given}: give one number above 0 for each of the {len(sets)} sets")
        self.sets = tuple(sets)
        self.counts = shares(given)
        """Draws from each set in a cycle."""
        self.firsts = (0, *itertools.accumulate(len(one) for one in sets[:-1]))
        """Number of each set's first image."""
        for one, weight, count in zip(sets, given, self.counts, strict=True):
            if not count:
                raise ConfigError(
                    f"{one.folder}: weight {weight:g} of {sum(given):g} is less than one draw in {CYCLE}; give this "
                    f"set at least {sum(given) / CYCLE:.3g}, or leave it out"
                )

    def __len__(self) -> int:
        return sum(len(one) for one in self.sets)

    @property
    def name(self) -> str:
        """The names of all sets."""
        return " + ".join(one.name for one in self.sets)

    @property
    def folder(self) -> str:
        """The folders of all sets, for messages."""
        return ", ".join(str(one.folder) for one in self.sets)

    @property
    def fingerprint(self) -> str:
        """That of the only set, or a digest of those of all sets and of their shares."""
        if len(self.sets) == 1:
            return self.sets[0].fingerprint
        facts = [[one.fingerprint, count] for one, count in zip(self.sets, self.counts, strict=True)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def classes(self) -> list[str] | None:
        """Class names by label, where all sets have the same ones."""
        first = self.sets[0].classes
        return first if all(one.classes == first for one in self.sets) else None

    @property
    def pixels(self) -> Pixels:
        """What the first set's values mean: where a range must be settled, its statistics do."""
        return self.sets[0].pixels

    @property
    def multilabel(self) -> bool:
        """Whether images of some set may have several labels each."""
        return any(one.multilabel for one in self.sets)

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 (n,); -1 without one, or where it may have several, or sets' classes differ."""
        if len(self.sets) == 1 and not self.multilabel:
            return self.sets[0].labels
        if self.classes is None or self.multilabel:
            return np.full(len(self), -1, np.int32)
        return np.concatenate([one.labels for one in self.sets])

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the set that holds image `index`, and the image's number in it."""
        number = bisect.bisect_right(self.firsts, index) - 1
        return number, index - self.firsts[number]


class Draws:
    """The images of a mixture as they are drawn, without end; a place costs microseconds.

    Classes are balanced within each set; how much a set gives is said by the weights alone.
    """

    def __init__(self, mixture: Mixture, order: Order, seed: int) -> None:
        self._mixture, self._seed = mixture, seed
        self._epochs = [
            BalancedEpochs(order.balance, one.labels, seed, first)
            if order.balance
            else Epochs(order, len(one), seed, first)
            for one, first in zip(mixture.sets, mixture.firsts, strict=True)
        ]
        self._cycle = functools.lru_cache(2)(self._drawn)

    def __getitem__(self, place: int) -> Key:
        """Seed, epoch of its set (of its class, where these are balanced), and number of the image at a place."""
        cycle, at = divmod(place, CYCLE)
        numbers, before = self._cycle(cycle)
        number = int(numbers[at])
        epoch, image = self._epochs[number][cycle * self._mixture.counts[number] + int(before[at])]
        return Key(self._seed, epoch, self._mixture.firsts[number] + image)

    def _drawn(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The set of each draw in a cycle, and how many draws before it in the cycle are of the same set."""
        counts = self._mixture.counts
        numbers = Key(self._seed, cycle, 0).rng(_DRAWS).permutation(np.repeat(np.arange(len(counts)), counts))
        before = np.empty(CYCLE, np.int64)
        for number, count in enumerate(counts):
            before[numbers == number] = np.arange(count)
        return numbers, before


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to the weights that sum up to a cycle, by largest remainders."""
    return apportioned(weights, CYCLE)
