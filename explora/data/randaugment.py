"""RandAugment on 8-bit crops of red, green and blue, in the worker: Pillow's operations with timm's magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field
from torch import Tensor

from explora.config import Config

PROBABILITY: Final = 0.5
"""How often an operation that is drawn is carried out."""
LARGEST: Final = 10.0
"""The magnitude at which operations are strongest."""
_SMOOTH: Final = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


class Change(NamedTuple):
    """How an operation is carried out."""

    strength: float
    """Magnitude as a share of the largest one, in [0, 1]."""
    sign: int
    """-1 or 1: which way, where there are two."""
    resample: Image.Resampling
    """How pixels are moved, where they are."""

    @property
    def signed(self) -> float:
        """Strength and direction, in [-1, 1]."""
        return self.sign * self.strength


Fill: TypeAlias = tuple[int, ...]
Operation: TypeAlias = Callable[[Image.Image, Change, Fill], Image.Image]


def _posterized(image: Image.Image, change: Change, _: Fill) -> Image.Image:
    # At the largest magnitude no bit is kept, which ImageOps.posterize refuses from Pillow 13 on.
    step = 2 ** (4 + int(4 * change.strength))
    return image.point([level // step * step for level in range(256)] * 3)


def _add_to_dark(image: Image.Image, change: Change, _: Fill) -> Image.Image:
    added = int(110 * change.strength)
    return image.point([min(255, level + added) if level < 128 else level for level in range(256)] * 3)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Away from 1, which changes nothing, either way."""
    return lambda image, change, _: kind(image).enhance(max(0.1, 1 + 0.9 * change.signed))


def _sheared(across: float, down: float) -> Operation:
    """Each row (or column) moved by a share of its distance from the edge."""
    return lambda image, change, fill: _moved(
        image, (1, across * change.signed, 0, down * change.signed, 1, 0), change, fill
    )


def _translated(across: float, down: float) -> Operation:
    """Moved by a share of the image's sides."""
    return lambda image, change, fill: _moved(
        image, (1, 0, across * change.signed * image.width, 0, 1, down * change.signed * image.height), change, fill
    )


def _moved(image: Image.Image, matrix: tuple[float, ...], change: Change, fill: Fill) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, change.resample, fillcolor=fill)


OPERATIONS: Final[Mapping[str, Operation]] = MappingProxyType(
    {
        "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
        "Equalize": lambda image, *_: ImageOps.equalize(image),
        "Invert": lambda image, *_: ImageOps.invert(image),
        "Rotate": lambda image, change, fill: image.rotate(30 * change.signed, change.resample, fillcolor=fill),
        "PosterizeIncreasing": _posterized,
        "SolarizeIncreasing": lambda image, change, _: ImageOps.solarize(image, 256 - int(256 * change.strength)),
        "SolarizeAdd": _add_to_dark,
        "ColorIncreasing": _enhanced(ImageEnhance.Color),
        "ContrastIncreasing": _enhanced(ImageEnhance.Contrast),
        "BrightnessIncreasing": _enhanced(ImageEnhance.Brightness),
        "SharpnessIncreasing": _enhanced(ImageEnhance.Sharpness),
        "ShearX": _sheared(0.3, 0),
        "ShearY": _sheared(0, 0.3),
        "TranslateXRel": _translated(0.45, 0),
        "TranslateYRel": _translated(0, 0.45),
    }
)
"""By timm's names, in its order: those that grow with the magnitude."""
_NAMES: Final = tuple(OPERATIONS)


class RandAugment(Config):
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719) as timm has it; the defaults are its rand-m9-mstd0.5-inc1."""

    operations: int = Field(2, ge=1)
    """Operations drawn for each image, any of them more than once; each is then carried out half of the time."""
    magnitude: float = Field(9.0, ge=0, le=LARGEST)
    """How strong operations are, from 0 to 10."""
    std: float = Field(0.5, ge=0)
    """Standard deviation of the magnitude, which is drawn for each operation and cut to 0 to 10."""
    interpolation: Literal["random", "bicubic"] = "random"
    """How turned, sheared and moved pixels are interpolated: bilinear or bicubic by lot, as timm has it; or bicubic."""

    def draw(self, rng: np.random.Generator) -> list[tuple[str, Change]]:
        """The operations to carry out on one image, by name, in their order."""
        magnitudes = rng.normal(self.magnitude, self.std, self.operations).clip(0, LARGEST).tolist()
        drawn = []
        for magnitude, numbers in zip(magnitudes, rng.random((self.operations, 4)).tolist(), strict=True):
            which, done, sign, smooth = numbers
            if done < PROBABILITY:
                resample = _SMOOTH[int(2 * smooth) if self.interpolation == "random" else 1]
                change = Change(magnitude / LARGEST, -1 if sign < 0.5 else 1, resample)
                drawn.append((_NAMES[int(which * len(_NAMES))], change))
        return drawn

    def apply(self, crop: Tensor, rng: np.random.Generator, fill: Fill) -> Tensor:
        """A crop of red, green and blue, contiguous uint8 (H, W, 3), changed as `rng` has it, of the same shape.

        Args:
            fill: levels of what is moved in from outside of the crop.
        """
        image = Image.fromarray(crop.numpy())
        for name, change in self.draw(rng):
            image = OPERATIONS[name](image, change, fill)
        return torch.from_numpy(np.array(image))
