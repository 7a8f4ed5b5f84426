"""The view of supervised training: one crop with a label, and what may befall it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor

from explora.bands import Scaling
from explora.data import geometry, photometric
from explora.data.erasing import draw_box, erase
from explora.data.geometry import RandomCrop
from explora.data.randaugment import RandAugment
from explora.data.views import ERASING, RANDAUGMENT, Fraction, Jitter, Key, Range, Size, Views, check_range, unit


class Crop(Views):
    """One random resized crop with a label: supervised training.

    In this order: crop, flip and turn, RandAugment, jitter, normalisation, erasing.
    """

    name: Literal["crop"] = "crop"
    """Which views these are."""
    size: Size = 224
    """Side of the square crop, pixels."""
    scale: Range = (0.2, 1.0)
    """Share of the image's area that a crop covers."""
    flip: Fraction = 0.5
    """Probability of a left-right flip."""
    dihedral: bool = False
    """Also turn by a random multiple of 90 degrees; right for images from above, wrong for photographs."""
    randaugment: RandAugment | None = None
    """Random operations on red, green and blue, `{}` for the usual ones; null is off."""
    jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    """Strength of random brightness, contrast, saturation and hue, applied to every image."""
    erasing: Fraction | None = None
    """Probability that a box of 2 % to a third of the crop becomes noise; null, like 0, is off."""

    @model_validator(mode="after")
    def _ranges(self) -> Crop:
        check_range("scale", self.scale)
        return self

    @model_validator(mode="after")
    def _augments_photographs(self) -> Crop:
        if self.randaugment is None:
            return self
        found = None if self.colour else f"bands {', '.join(self.bands)}"
        if isinstance(self.scaling, Scaling) and self.scaling.unit != "level":
            found = f"values in {self.scaling.unit}"
        if found:
            raise ValueError(
                "randaugment is for 8-bit images of red, green and blue (B04, B03, B02, in this order), whose colours "
                f"and levels it changes, but these are {found}; set it to null, and use jitter, dihedral and erasing, "
                "which work for any bands"
            )
        return self

    def names(self) -> frozenset[str]:
        return frozenset({"image", "label"})

    def sides(self) -> tuple[int, ...]:
        return (self.size,)

    def enough(self) -> int:
        return self._crop.enough()

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        (numbers,) = key.numbers(1)
        crop = self._crop.cut(image, numbers).contiguous()
        if self.randaugment is not None:
            fill = tuple(min(255, round(255 * mean)) for mean in self.mean)
            crop = self.randaugment.apply(crop, key.rng(RANDAUGMENT), fill)
        row = photometric.draw(numbers[geometry.NUMBERS :], jitter=self.jitter)
        views = {"image": crop, "photometric": torch.tensor(row)}
        if self.erasing:
            views["erasing"] = torch.tensor(draw_box(key.rng(ERASING), self.erasing, self.size))
        return views

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        done = dict(batch)
        images = photometric.apply(unit(batch["image"]), done.pop("photometric"), self.colour)
        images = self.normalise(images)
        if self.erasing:
            erase(images, done.pop("erasing"))
        return done | {"image": images}

    @property
    def _crop(self) -> RandomCrop:
        return RandomCrop(self.size, self.scale, self.flip, self.dihedral)
