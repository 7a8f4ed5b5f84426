"""The order of a set's images, epoch after epoch: a function of seed and epoch that nobody has to replay."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
from pydantic import Field

from explora.config import Config
from explora.data.views import ORDER, STEP, Key

_BLOCKS = STEP + 1
"""The next number beyond any view, see `views`."""


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

    def __str__(self) -> str:
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
