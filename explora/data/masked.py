"""Views of the MAE objective: one crop an image, and the noise that decides which of its tokens are hidden."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from explora.data.geometry import RandomCrop
from explora.data.views import STEP, Fraction, Key, Range, Size, Views, check_range, unit


class MaskedCrop(Views):
    """One random resized crop, flipped, with no photometrics (He et al. 2022), and noise over its tokens."""

    name: Literal["masked_crop"] = "masked_crop"
    """Which views these are."""
    size: Size = 224
    """Side of the square crop, pixels; a multiple of `patch_size`."""
    scale: Range = (0.2, 1.0)
    """Share of the image's area that the crop covers."""
    flip: Fraction = 0.5
    """Probability of a left-right flip."""
    dihedral: bool = False
    """Also turn by a random multiple of 90 degrees; right for images from above, wrong for photographs."""
    patch_size: Size = 16
    """The backbone's patch side, pixels."""
    groups: int = Field(1, ge=1)
    """Tokens of one patch place: the number of the backbone's channel groups."""

    @model_validator(mode="after")
    def _fits(self) -> MaskedCrop:
        # Left out, it will be the backbone's, and the size is checked then.
        patch = self.patch_size if "patch_size" in self.model_fields_set else 1
        if self.size % patch:
            low, high = self.size // patch * patch, -(-self.size // patch) * patch
            nearest = f"{low} and {high}" if low else str(high)
            raise ValueError(f"size {self.size} is not a multiple of patch_size {patch}; nearest: {nearest}")
        check_range("scale", self.scale)
        return self

    def names(self) -> frozenset[str]:
        return frozenset({"image", "noise"})

    def sides(self) -> tuple[int, ...]:
        return (self.size,)

    def enough(self) -> int:
        return self._crop.enough()

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        (numbers,) = key.numbers(1)
        return {"image": self._crop.cut(image, numbers).contiguous()}

    def step(self, seed: int, first: int, batch: int) -> dict[str, Tensor]:
        """`noise` (batch, groups * N), uniform in [0, 1): the objective keeps the tokens with the least of it."""
        tokens = self.groups * (self.size // self.patch_size) ** 2
        noise = Key(seed, 0, first).rng(STEP).random((batch, tokens), dtype=np.float32)
        return {"noise": torch.from_numpy(noise)}

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | {"image": self.normalise(unit(batch["image"]))}

    @property
    def _crop(self) -> RandomCrop:
        return RandomCrop(self.size, self.scale, self.flip, self.dihedral)
