"""From one decoded image to the views a task learns from.

Three moments: `sample` crops to uint8 in a worker, `step` draws what a whole optimizer step shares, `finish`
applies photometric changes and normalises on the device. Up to `finish` the first axis of every tensor is the image
and the last one of crops the channel, as images are decoded; `finish` puts channels before pixels, and the view axis
in front of the image where there is one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from explora.bands import RGB, Scaling, canonical
from explora.config import Config
from explora.data import geometry, photometric
from explora.data.geometry import CenterCrop, RandomCrop
from explora.data.masks import block_masks

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Numbers beyond any view: what hangs on an epoch or on a step and not on one crop, then what a crop may draw beside
# the numbers that all crops use.
ORDER, STEP, RANDAUGMENT, ERASING = range(2**32, 2**32 + 4)

Rule: TypeAlias = Literal["levels", "sigma", "percentiles"]
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Strength: TypeAlias = Annotated[float, Field(ge=0)]
Range: TypeAlias = tuple[Fraction, Fraction]
Jitter: TypeAlias = tuple[Strength, Strength, Strength, Annotated[float, Field(ge=0, le=0.5)]]
Size: TypeAlias = Annotated[int, Field(ge=1)]


class Key(NamedTuple):
    """What randomness hangs on: never on workers, ranks, or on how far a run got before it stopped."""

    seed: int
    epoch: int
    sample: int

    def rng(self, view: int) -> np.random.Generator:
        """An independent generator for each (seed, epoch, sample, view), all below 2^64."""
        key = np.array([self.seed, self.sample], dtype=np.uint64)
        # The lowest word counts the numbers drawn, so streams never meet.
        counter = np.array([0, 0, self.epoch, view], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def numbers(self, views: int) -> list[list[float]]:
        """What each of the sample's first `views` views is drawn from: `NUMBERS` in [0, 1) for its crop, then others.

        Those of a view are the same however many follow it.
        """
        return self.rng(0).random((views, geometry.NUMBERS + photometric.NUMBERS)).tolist()


class Views(Config):
    """How images become a batch; picked in YAML by `name`."""

    bands: tuple[str, ...] = Field(RGB, min_length=1)
    """Channels in the order that the backbone takes them, by any name in use; those of the backbone when left out."""
    scaling: Scaling | Rule | None = None
    """Which values become 0 and 1: `levels` (8-bit images as they are), `sigma` (mean +- 2 std of the shards),
    `percentiles` (2nd to 98th), or numbers; left out: the backbone's, else `levels` or `sigma`, as the images need."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Channel means of images in [0, 1]; those the backbone was trained with."""
    std: tuple[Strength, ...] = IMAGENET_STD
    """Channel standard deviations of images in [0, 1]."""
    scaled_decode: bool = False
    """Decode JPEGs at a half, a quarter or an eighth of their size if no crop needs more: far faster from 1024 px on,
    but crops are then near those of the whole image, not the same."""

    @property
    def colour(self) -> bool:
        """Whether the channels are red, green and blue, which alone have a luma and a hue."""
        return self.bands == RGB

    @abstractmethod
    def names(self) -> frozenset[str]:
        """The keys of the finished batch."""

    @abstractmethod
    def sides(self) -> tuple[int, ...]:
        """Sides in pixels of the crops made of one image."""

    def enough(self) -> int:
        """Short side in pixels of an image from which on no crop of it is ever enlarged; 0: nobody knows."""
        return 0

    def needed(self) -> int:
        """What `decode` must leave of the short side of an image, pixels; 0: all of it."""
        return self.enough() if self.scaled_decode else 0

    @abstractmethod
    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        """One image of levels, uint8 (H, W, C), see `Intake`, to crops, uint8 (..., size, size, C), and parameters."""

    def step(self, seed: int, first: int, batch: int) -> dict[str, Tensor]:
        """What the `batch` images of a step from global sample number `first` on share, each (batch, ...)."""
        return {}

    @abstractmethod
    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The stacked batch, on any device, to the tensors of `names()`; images become float32."""

    @field_validator("bands")
    @classmethod
    def _canonical(cls, bands: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(canonical, bands))

    @model_validator(mode="after")
    def _positive_std(self) -> Views:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give both for every channel")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0 in every channel")
        # Only of two that are given: what is left out will be the backbone's.
        if self.model_fields_set >= {"bands", "mean"} and len(self.mean) != len(self.bands):
            names = ", ".join(self.bands)
            raise ValueError(
                f"mean and std have {len(self.mean)} channels, but {len(self.bands)} bands are named: {names}"
            )
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) in [0, 1] to zero mean and unit variance, in place; returns them."""
        mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def pixels(self, images: Tensor) -> np.ndarray:
        """Normalised images (B, C, H, W) back to uint8 (B, H, W, 3), for people to look at.

        Red, green and blue where the bands hold them, else the first three, or the first one in grey.
        """
        shown = [0, 1, 2] if images.shape[1] >= 3 else [0, 0, 0]
        if set(RGB) <= set(self.bands):
            shown = [self.bands.index(name) for name in RGB]
        mean, std = (images.new_tensor(value)[shown].view(-1, 1, 1) for value in (self.mean, self.std))
        levels = (images[:, shown].float() * std + mean).mul(255).round().clamp(0, 255)
        return levels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


class Center(Views):
    """Resize the short side, cut the centre: evaluation, nothing random."""

    name: Literal["center"] = "center"
    """Which views these are."""
    size: Size = 224
    """Side of the square crop, pixels."""
    resize: Size | None = None
    """Length of the short side before the crop, pixels; 8/7 of `size` when left out."""

    @model_validator(mode="after")
    def _resize_covers_size(self) -> Center:
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize {self.resize} is smaller than size {self.size}")
        return self

    def names(self) -> frozenset[str]:
        return frozenset({"image", "label"})

    def sides(self) -> tuple[int, ...]:
        return (self.size,)

    def enough(self) -> int:
        return self.resize or round(self.size * 8 / 7)

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        return {"image": CenterCrop(self.size, self.enough()).cut(image).contiguous()}

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Classes of the pixels of a stored image, uint8 (H, W), to those of its crop, uint8 (size, size)."""
        return CenterCrop(self.size, self.enough()).cut_mask(mask)

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | {"image": self.normalise(unit(batch["image"]))}


class MultiCrop(Views):
    """Two global and several local crops with the official DINOv2 photometrics, and iBOT's masks.

    Blur probabilities are the effective ones of the official code (0 / 0.9 / 0.5), not the nominal ones.
    """

    name: Literal["multicrop"] = "multicrop"
    """Which views these are."""
    global_size: Size = 224
    """Side of the two global crops, pixels; a multiple of `patch_size`."""
    global_scale: Range = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_size: Size = 96
    """Side of the local crops, pixels; a multiple of `patch_size`."""
    local_scale: Range = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    local_crops: Size = 8
    """Local crops for each image."""
    flip: Fraction = 0.5
    """Probability of a left-right flip."""
    dihedral: bool = False
    """Also turn by a random multiple of 90 degrees; right for images from above, wrong for photographs."""
    jitter: Jitter = (0.4, 0.4, 0.2, 0.1)
    """Strength of random brightness, contrast, saturation and hue."""
    jitter_probability: Fraction = 0.8
    """Probability of the jitter."""
    grey: Fraction = 0.2
    """Probability of turning grey."""
    blur: tuple[Fraction, Fraction, Fraction] = (0.0, 0.9, 0.5)
    """Probability of a Gaussian blur for the first global, the second global, the local crops."""
    solarize: Fraction = 0.2
    """Probability of inverting the bright pixels of the second global crop."""
    patch_size: Size = 16
    """The backbone's patch side, pixels."""
    mask_probability: Fraction = 0.5
    """Share of the global crops that are masked."""
    mask_ratio: Range = (0.1, 0.5)
    """Least and largest share of patches hidden in a masked crop."""

    @model_validator(mode="after")
    def _fits_patches(self) -> MultiCrop:
        # Left out, it will be the backbone's, and the sizes are checked then.
        patch = self.patch_size if "patch_size" in self.model_fields_set else 1
        for field, size in (("global_size", self.global_size), ("local_size", self.local_size)):
            if size % patch:
                low, high = size // patch * patch, -(-size // patch) * patch
                nearest = f"{low} and {high}" if low else str(high)
                raise ValueError(f"{field} {size} is not a multiple of patch_size {patch}; nearest: {nearest}")
        if self.local_size <= photometric.REACH:
            raise ValueError(f"local_size {self.local_size} is too small to blur")
        check_range("global_scale", self.global_scale)
        check_range("local_scale", self.local_scale)
        check_range("mask_ratio", self.mask_ratio)
        return self

    def names(self) -> frozenset[str]:
        return frozenset({"global", "local", "mask"})

    def sides(self) -> tuple[int, ...]:
        return (self.global_size,) * 2 + (self.local_size,) * self.local_crops

    def enough(self) -> int:
        return max(crop.enough() for crop in self._crops.values())

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        first, second, local = self.blur
        chances = {"global": [(first, 0.0), (second, self.solarize)], "local": [(local, 0.0)] * self.local_crops}
        numbers = iter(key.numbers(2 + self.local_crops))
        views: dict[str, Tensor] = {}
        for name, crop in self._crops.items():
            group = torch.empty(len(chances[name]), crop.size, crop.size, image.shape[2], dtype=torch.uint8)
            rows = []
            for place, (blur, solarize) in zip(group, chances[name], strict=True):
                drawn = next(numbers)
                place.copy_(crop.cut(image, drawn))
                rows.append(self._row(drawn[geometry.NUMBERS :], blur, solarize))
            views |= {name: group, f"{name}_photometric": torch.tensor(rows)}
        return views

    def step(self, seed: int, first: int, batch: int) -> dict[str, Tensor]:
        side = self.global_size // self.patch_size
        rng = Key(seed, 0, first).rng(STEP)
        masks = block_masks(rng, 2 * batch, (side, side), self.mask_probability, self.mask_ratio)
        return {"mask": torch.from_numpy(masks).view(batch, 2, side * side)}

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        done = {"mask": batch["mask"].transpose(0, 1).contiguous()}
        for name in ("global", "local"):
            crops, rows = (batch[key].transpose(0, 1) for key in (name, f"{name}_photometric"))
            images = unit(crops)
            photometric.apply(images.flatten(0, 1), rows.flatten(0, 1), self.colour)
            done[name] = self.normalise(images)
        return done

    @property
    def _crops(self) -> dict[str, RandomCrop]:
        sizes = {"global": (self.global_size, self.global_scale), "local": (self.local_size, self.local_scale)}
        return {name: RandomCrop(*size, self.flip, self.dihedral) for name, size in sizes.items()}

    def _row(self, numbers: list[float], blur: float, solarize: float) -> list[float]:
        return photometric.draw(
            numbers,
            jitter=self.jitter,
            jitter_probability=self.jitter_probability,
            grey=self.grey,
            blur=blur,
            solarize=solarize,
        )


def check_range(name: str, limits: Range) -> None:
    """Refuse an empty or falling range; pydantic and `explora.config` make the ValueError a ConfigError."""
    low, high = limits
    if low > high or high == 0:
        raise ValueError(f"{name} must go from a smaller to a larger share above 0, got {low} to {high}")


def unit(crops: Tensor) -> Tensor:
    """Crops, uint8 (..., H, W, C), to images, float32 (..., C, H, W) in [0, 1]."""
    return crops.movedim(-1, -3).contiguous().to(torch.float32).div_(255)
