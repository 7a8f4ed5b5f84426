"""Crops of images of levels, random or of the centre: where, flipped, turned, and resized as PIL does it.

Everything random is a function of numbers in [0, 1) that the caller has drawn, so that the crops of one image cost one
generator, and the same numbers give the same part of the image at any resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

TRIES = 10
NUMBERS = 2 * TRIES + 4
"""Numbers that one crop uses: area and aspect of each try, place down and across, flip, turn."""
RATIO = (3 / 4, 4 / 3)
SMALLEST = 1e-4
"""Share of an area below which nobody asks whether a crop is enlarged."""
FAST_CHANNELS = 4
"""Most channels of torch's kernel for uint8 images; more than four go to one that is ten times slower."""


class Box(NamedTuple):
    """A part of an image, pixels."""

    top: int
    left: int
    height: int
    width: int


class RandomCrop(NamedTuple):
    """How crops of one kind are drawn."""

    size: int
    """Side of the square crop, pixels."""
    scale: tuple[float, float]
    """Share of the image's area that it covers."""
    flip: float
    """Probability of a left-right flip."""
    dihedral: bool
    """Also turn by a random multiple of 90 degrees."""

    def enough(self) -> int:
        """Short side in pixels of an image from which on no crop is enlarged."""
        share = max(self.scale[0], SMALLEST)
        return math.ceil(self.size / math.sqrt(share * RATIO[0])) + 1

    def cut(self, image: np.ndarray, numbers: Sequence[float]) -> Tensor:
        """The crop of uint8 (H, W, C) that `numbers` (at least `NUMBERS`) say: uint8 (size, size, C)."""
        top, left, height, width = crop_box(numbers, image.shape[0], image.shape[1], self.scale)
        crop = resize(image[top : top + height, left : left + width], self.size, self.size)
        if numbers[NUMBERS - 2] < self.flip:
            crop = crop.flip(1)
        return crop.rot90(int(numbers[NUMBERS - 1] * 4)) if self.dihedral else crop


class CenterCrop(NamedTuple):
    """The middle of an image whose short side is resized."""

    size: int
    """Side of the square crop, pixels."""
    short: int
    """Length of the short side before the crop, pixels."""

    def cut(self, image: np.ndarray) -> Tensor:
        """The crop of uint8 (H, W, C): uint8 (size, size, C)."""
        height, width = self._sides(*image.shape[:2])
        return resize(image, height, width)[self._middle(height), self._middle(width)]

    def cut_mask(self, mask: np.ndarray) -> np.ndarray:
        """The same part of classes (H, W), which have nothing between them: the nearest ones, (size, size)."""
        height, width = self._sides(*mask.shape)
        return resize_nearest(mask, height, width)[self._middle(height), self._middle(width)]

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        factor = self.short / min(height, width)
        return max(self.short, int(height * factor)), max(self.short, int(width * factor))

    def _middle(self, side: int) -> slice:
        start = round((side - self.size) / 2)
        return slice(start, start + self.size)


def crop_box(numbers: Sequence[float], height: int, width: int, scale: tuple[float, float]) -> Box:
    """A random resized crop (Szegedy et al. 2015) as torchvision draws it.

    Ten tries of an area uniform in `scale` and an aspect log-uniform in `RATIO`; then the centre.
    """
    low, high = map(math.log, RATIO)
    for area, aspect in zip(numbers[0 : 2 * TRIES : 2], numbers[1 : 2 * TRIES : 2], strict=True):
        pixels = height * width * (scale[0] + area * (scale[1] - scale[0]))
        ratio = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            down, across = numbers[2 * TRIES : 2 * TRIES + 2]
            return Box(int(down * (height - h + 1)), int(across * (width - w + 1)), h, w)
    h = min(height, round(width / RATIO[0]))
    w = min(width, round(height * RATIO[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resize(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (H, W, C) to uint8 (height, width, C): bicubic, antialiased, no float copy of the image."""
    channels = image.shape[2]
    if channels <= FAST_CHANNELS:
        # Copied even where it is whole, because torch takes no array that may not be written to.
        return _resize(torch.from_numpy(np.array(image, order="C"))[None], height, width)[0]
    # Fours of channels, the last one filled up, as so many images; a four is moved as one 32-bit word.
    fours = -(-channels // 4)
    filled = np.zeros((*image.shape[:2], 4 * fours), np.uint8)
    filled[..., :channels] = image
    apart = filled.view(np.uint32).transpose(2, 0, 1).copy()[..., None].view(np.uint8)
    words = _resize(torch.from_numpy(apart), height, width).numpy().view(np.uint32)[..., 0]
    together = words.transpose(1, 2, 0).copy().view(np.uint8)
    return torch.from_numpy(together)[..., :channels]


def resize_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) to (height, width): of each new pixel the old one that its centre lies in, aligned with `resize`."""
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(mask.shape, (height, width), strict=True)
    )
    return mask[np.ix_(rows, columns)]


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    """Contiguous (n, H, W, C) to (n, height, width, C), which torch's kernel need not repack for 3 or 4 channels."""
    return interpolate(images.permute(0, 3, 1, 2), (height, width), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
