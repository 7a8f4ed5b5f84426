"""From one decoded image to the views a task learns from.

Three moments: `sample` crops to uint8 in a worker, `step` draws what a whole optimizer step shares, `finish`
applies photometric changes and normalises on the device. Up to `finish` the first axis of every tensor is the
image; `finish` puts the view axis in front of it where there is one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from explora.bands import RGB, Scaling, canonical
from explora.config import Config
from explora.data import photometric
from explora.data.masks import block_masks

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Numbers beyond any view: what hangs on an epoch or on a step and not on one crop.
ORDER = 2**32
STEP = 2**32 + 1

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

    @abstractmethod
    def names(self) -> frozenset[str]:
        """The keys of the finished batch."""

    @abstractmethod
    def sides(self) -> tuple[int, ...]:
        """Sides in pixels of the crops made of one image."""

    @abstractmethod
    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        """One image of levels, uint8 (H, W, C), see `Intake`, to crops, uint8, and parameters for `finish`, float32."""

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
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W) in [0, 1] to zero mean and unit variance, in place; returns them."""
        mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def pixels(self, images: Tensor) -> np.ndarray:
        """Normalised images (B, C, H, W) back to uint8 (B, H, W, C), for people to look at."""
        mean, std = (images.new_tensor(value).view(-1, 1, 1) for value in (self.mean, self.std))
        levels = (images.float() * std + mean).mul(255).round().clamp(0, 255)
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

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        height, width = image.shape[:2]
        short = self.resize or round(self.size * 8 / 7)
        factor = short / min(height, width)
        resized = resize(image, max(short, int(height * factor)), max(short, int(width * factor)))
        top, left = (round((side - self.size) / 2) for side in resized.shape[1:])
        return {"image": resized[:, top : top + self.size, left : left + self.size].contiguous()}

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch | {"image": self.normalise(unit(batch["image"]))}


class Crop(Views):
    """One random resized crop with a label: supervised training."""

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
    jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    """Strength of random brightness, contrast, saturation and hue, applied to every image."""

    @model_validator(mode="after")
    def _ranges(self) -> Crop:
        check_range("scale", self.scale)
        return self

    def names(self) -> frozenset[str]:
        return frozenset({"image", "label"})

    def sides(self) -> tuple[int, ...]:
        return (self.size,)

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        rng = key.rng(0)
        crop = random_crop(image, rng, self.size, self.scale, self.flip, self.dihedral)
        return {"image": crop, "photometric": photometric.draw(rng, jitter=self.jitter)}

    def finish(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        done = dict(batch)
        images = photometric.apply(unit(batch["image"]), done.pop("photometric"))
        return done | {"image": self.normalise(images)}


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

    def sample(self, image: np.ndarray, key: Key) -> dict[str, Tensor]:
        first, second, local = self.blur
        whole = [self._view(image, key, 0, first), self._view(image, key, 1, second, self.solarize)]
        parts = [self._view(image, key, 2 + number, local) for number in range(self.local_crops)]
        views: dict[str, Tensor] = {}
        for name, group in (("global", whole), ("local", parts)):
            views[name] = torch.stack([crop for crop, _ in group])
            views[f"{name}_photometric"] = torch.stack([row for _, row in group])
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
            images = photometric.apply(unit(crops.flatten(0, 1)), rows.flatten(0, 1))
            done[name] = self.normalise(images).view(crops.shape)
        return done

    def _view(
        self, image: np.ndarray, key: Key, number: int, blur: float, solarize: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        rng = key.rng(number)
        size, scale = (self.global_size, self.global_scale) if number < 2 else (self.local_size, self.local_scale)
        crop = random_crop(image, rng, size, scale, self.flip, self.dihedral)
        row = photometric.draw(
            rng,
            jitter=self.jitter,
            jitter_probability=self.jitter_probability,
            grey=self.grey,
            blur=blur,
            solarize=solarize,
        )
        return crop, row


def check_range(name: str, limits: Range) -> None:
    """Refuse an empty or falling range; pydantic and `explora.config` make the ValueError a ConfigError."""
    low, high = limits
    if low > high or high == 0:
        raise ValueError(f"{name} must go from a smaller to a larger share above 0, got {low} to {high}")


def unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def resize(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (H, W, C) to uint8 (C, height, width): bicubic, antialiased, no float copy of the image."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]


def crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: Range,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random resized crop (Szegedy et al. 2015, as torchvision draws it).

    Ten tries of an area uniform in `scale` and an aspect log-uniform in `ratio`; then the centre.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, scale: Range, flip: float, dihedral: bool
) -> Tensor:
    """A random resized crop, flipped and turned: uint8 (C, size, size)."""
    top, left, height, width = crop_box(rng, image.shape[0], image.shape[1], scale)
    crop = resize(image[top : top + height, left : left + width], size, size)
    if rng.random() < flip:
        crop = crop.flip(2)
    if dihedral:
        crop = crop.rot90(int(rng.integers(4)), (1, 2))
    return crop.contiguous()
