"""The order of a set's images, epoch after epoch: a function of seed and epoch that nobody has to replay."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from explora.config import Config
from explora.data.views import ORDER, STEP, Key

_BLOCKS = STEP + 1
"""The next number beyond any view, see `views`; that after it is taken in `mixture`."""
_ROUND, _BALANCED = STEP + 3, STEP + 4


class Order(Config):
    """How each epoch is shuffled.

    `blocks` permutes blocks of consecutive images over the whole set, then all images within each window of such
    blocks: reads stay near each other, and any place is found at once in a set of any size. A set of no more than
    block x window images (8192) is one window, so it is shuffled fully; of a larger one, an image meets in its
    window those of `window` blocks from anywhere.
    """

    shuffle: Literal["blocks", "full", "none"] = "blocks"
    """In blocks, every image on its own (8 bytes of memory for each), or not at all."""
    block: int = Field(64, ge=1)
    """Consecutive images that stay in one window."""
    window: int = Field(128, ge=1)
    """Blocks among whose images is shuffled."""
    balance: float = Field(0.0, ge=0, le=1)
    """How far classes come equally often: an image's chance is its class's size to the power of minus this; above 0
    labels are needed, and the whole set is shuffled as by `full`."""

    @model_validator(mode="after")
    def _balanced_are_shuffled(self) -> Order:
        if self.balance and self.shuffle == "none":
            raise ValueError("balance draws images anew in every epoch; leave shuffle out, or set balance to 0")
        return self

    def __str__(self) -> str:
        if self.balance:
            return f"balanced {self.balance:g}"
        return f"blocks {self.block} x {self.window}" if self.shuffle == "blocks" else self.shuffle


class Epochs:
    """The numbers of `n` images in the order of one epoch after the other, without end.

    Each epoch is a permutation. A place costs microseconds; the first one of an epoch some nanoseconds for each
    block, the first one of a window as much for each image in it.

    Args:
        first: what tells this set from others with the same seed: where its images begin among theirs.
    """

    def __init__(self, order: Order, n: int, seed: int, first: int = 0) -> None:
        self._n, self._seed, self._first = n, seed, first
        self._plain = order.shuffle == "none"
        # A full shuffle is that of one window, which is one block.
        self._block, self._window = (n, 1) if order.shuffle == "full" else (order.block, order.window)
        # Two, because a batch may run across.
        self._blocks = functools.lru_cache(2)(self._permuted)
        self._images = functools.lru_cache(2)(self._shuffled)

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Epoch and number of the image at a place, counted from 0 without regard to epochs."""
        epoch, at = divmod(place, self._n)
        if self._plain:
            return epoch, at
        window, start = self._around(epoch, at)
        return epoch, int(self._images(epoch, window)[at - start])

    def _around(self, epoch: int, at: int) -> tuple[int, int]:
        """The window that holds a place of the epoch, and where it starts.

        All windows are equally long but for the one with the short block, and the last.
        """
        size, missing = self._block * self._window, -self._n % self._block
        _, short = self._blocks(epoch)
        if at < (short + 1) * size - missing:
            return at // size, at // size * size
        window = (at + missing) // size
        return window, window * size - missing

    def _permuted(self, epoch: int) -> tuple[np.ndarray, int]:
        """The blocks of an epoch in their order, and the window with the set's last block, which may be short."""
        count = -(-self._n // self._block)
        blocks = Key(self._seed, epoch, self._first).rng(_BLOCKS).permutation(count)
        return blocks, int(blocks.argmax()) // self._window

    def _shuffled(self, epoch: int, window: int) -> np.ndarray:
        """The images of a window of blocks in their order."""
        blocks = self._blocks(epoch)[0][window * self._window : (window + 1) * self._window]
        images = (blocks[:, None] * self._block + np.arange(self._block)).ravel()
        return Key(self._seed, epoch, self._first + window).rng(ORDER).permutation(images[images < self._n])


class BalancedEpochs:
    """The numbers of labelled images, small classes more often than large ones, without end.

    Every epoch is as long as the set and holds n_c ** (1 - balance) images of each class c of n_c, in proportion: 0
    gives each image once, 1 every class equally often. Fractions are carried over, so that after any number of epochs
    a class is off by less than one image. It goes through all its images before it begins a new round, so an epoch
    may end before all images of a large class have come; the next one goes on with the others.

    It costs some 40 bytes for each image of the set, and the first place of an epoch a third of a microsecond for each.

    Args:
        labels: class of each image (n,), none below 0.
        first: as for `Epochs`.
    """

    def __init__(self, balance: float, labels: np.ndarray, seed: int, first: int = 0) -> None:
        self._n, self._seed, self._first = len(labels), seed, first
        _, sizes = np.unique(labels, return_counts=True)
        self._members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
        self._weights = sizes ** (1.0 - balance)
        # Two, because a batch may run across.
        self._epochs = functools.lru_cache(2)(self._drawn)

    def __getitem__(self, place: int) -> tuple[int, int]:
        """How often the image at a place has come before, and its number; places count without regard to epochs."""
        epoch, at = divmod(place, self._n)
        rounds, images = self._epochs(epoch)
        return int(rounds[at]), int(images[at])

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rounds and images of an epoch in their order."""
        starts, ends = (apportioned(self._weights, which * self._n) for which in (epoch, epoch + 1))
        parts = [self._of_class(number, *span) for number, span in enumerate(zip(starts, ends, strict=True))]
        rounds, images = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = Key(self._seed, epoch, self._first).rng(_BALANCED).permutation(self._n)
        return rounds[order], images[order]

    def _of_class(self, number: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rounds and images of a class from one of its draws up to another, all its rounds in a row."""
        members = self._members[number]
        size = len(members)
        rounds = range(start // size, end // size + 1)
        shuffled = [Key(self._seed, which, self._first + number).rng(_ROUND).permutation(members) for which in rounds]
        taken = slice(start - rounds.start * size, end - rounds.start * size)
        return np.repeat(rounds, size)[taken], np.concatenate(shuffled)[taken]


def apportioned(weights: Sequence[float] | np.ndarray, total: int) -> tuple[int, ...]:
    """Whole numbers in proportion to the weights that sum up to `total`, by largest remainders."""
    exact = np.array(weights) / sum(weights) * total
    counts = np.floor(exact).astype(int)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - counts.sum()]] += 1
    return tuple(counts.tolist())
