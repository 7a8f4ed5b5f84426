"""Random erasing: a box of some images becomes noise. Source: Zhong et al. 2020 (arXiv 1708.04896), as timm has it.

Workers draw a row for each image; the host draws the noise from the row's seed alone, so that it is the same on any
device and in any batch.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from torch import Tensor

TRIES: Final = 10
AREA: Final = (0.02, 1 / 3)
"""Least and largest share of the image that is erased."""
ASPECT: Final = (0.3, 1 / 0.3)
"""Least and largest height of a box over its width."""


def draw_box(rng: np.random.Generator, probability: float, side: int) -> list[int]:
    """Top, left, height and width, in pixels, of the box to erase of an image of so many a side; the noise's seed.

    Ten tries of an area uniform in `AREA` and an aspect log-uniform in `ASPECT`, until one is smaller than the image;
    then no box. Height and width are 0 where there is none.
    """
    seed = int(rng.integers(2**63))
    erased, down, across, *tries = rng.random(3 + 2 * TRIES).tolist()
    low, high = map(math.log, ASPECT)
    for area, aspect in zip(tries[::2], tries[1::2], strict=True) if erased < probability else ():
        pixels = side * side * (AREA[0] + area * (AREA[1] - AREA[0]))
        ratio = math.exp(low + aspect * (high - low))
        height, width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if height < side and width < side:
            return [int(down * (side - height + 1)), int(across * (side - width + 1)), height, width, seed]
    return [0, 0, 0, 0, seed]


def erase(images: Tensor, rows: Tensor) -> Tensor:
    """Fill a box of each of the normalised images, float (n, C, H, W), with standard normal noise, in place.

    Args:
        rows: of `draw_box`, int64 (n, 5).
    """
    for image, (top, left, height, width, seed) in zip(images, rows.tolist(), strict=True):
        noise = np.random.default_rng(seed).standard_normal((len(image), height, width), dtype=np.float32)
        image[:, top : top + height, left : left + width].copy_(torch.from_numpy(noise))
    return images
