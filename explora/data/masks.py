"""iBOT's block-wise masks with counts that are exact and never depend on chance, so shapes stay fixed."""

from __future__ import annotations

import math

import numpy as np

MIN_BLOCK = 4
MIN_ASPECT = 0.3
TRIES = 10


def block_masks(
    rng: np.random.Generator,
    images: int,
    grid_hw: tuple[int, int],
    probability: float,
    ratio: tuple[float, float],
) -> np.ndarray:
    """Masks bool (images, H * W), True where a patch is hidden.

    Exactly `int(images * probability)` images are masked. `ratio` is cut into as many equal bins; masked
    image i hides exactly `int(N * upper edge of bin i)` patches. Which image gets which mask is shuffled.
    Blocks as in BEiT (Bao et al. 2022, algorithm 1), single patches to reach the count (DINOv3).
    """
    height, width = grid_hw
    masked = int(images * probability)
    masks = np.zeros((images, height, width), dtype=bool)
    for mask, edge in zip(masks, np.linspace(*ratio, masked + 1)[1:], strict=False):
        count = int(height * width * edge)
        _add_blocks(rng, mask, count)
        free = np.flatnonzero(~mask)
        mask.flat[rng.permutation(free)[: count - mask.sum()]] = True
    return rng.permutation(masks).reshape(images, height * width)


def _add_blocks(rng: np.random.Generator, mask: np.ndarray, count: int) -> None:
    """Hide random rectangles until less than a block is missing, or a rectangle finds no place."""
    missing = count
    while missing >= MIN_BLOCK:
        added = _add_block(rng, mask, min(missing, max(MIN_BLOCK, mask.size // 2)))
        if not added:
            return
        missing -= added


def _add_block(rng: np.random.Generator, mask: np.ndarray, most: int) -> int:
    """Try to hide one rectangle that adds at most `most` patches; returns how many it added."""
    height, width = mask.shape
    for _ in range(TRIES):
        area = rng.uniform(MIN_BLOCK, most)
        aspect = math.exp(rng.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
        block = mask[top : top + h, left : left + w]
        added = h * w - int(block.sum())
        if 0 < added <= most:
            block[:] = True
            return added
    return 0
