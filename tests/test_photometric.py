"""Batched photometric operations against torchvision, PIL, scipy, colorsys and naive versions; how often each comes."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import correlate1d, zoom
from scipy.stats import binom
from torch import Tensor
from torchvision.transforms.v2 import functional

from explora.bands import RGB
from explora.data import Crop, Key, MultiCrop, geometry, photometric

OFFICIAL = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_probability": 0.8, "grey": 0.2, "blur": 0.5, "solarize": 0.2}


def picture(seed: int = 0, height: int = 48, width: int = 60, channels: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (6, 6, channels))
    return zoom(noise, (height / 6, width / 6, 1), order=1).clip(0, 255).astype(np.uint8)


def levels(image: Tensor) -> np.ndarray:
    """(C, H, W) in [0, 1] to (H, W, C) in levels of 255, not rounded."""
    return image.permute(1, 2, 0).numpy() * 255


def floats(images: list[np.ndarray]) -> Tensor:
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images])


def rows(n: int) -> Tensor:
    """The first changes nothing."""
    drawn = [photometric.draw(Key(3, 0, k).numbers(1)[0][geometry.NUMBERS :], **OFFICIAL) for k in range(n)]
    return torch.tensor([photometric.IDENTITY, *drawn[1:]])


# Tolerances in levels of 255: PIL rounds its grey and its result, we do not.
@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        (photometric.brightness, ImageEnhance.Brightness, 1.0),
        (lambda some, factor: photometric.contrast(some, factor, True), ImageEnhance.Contrast, 2.0),
        (lambda some, factor: photometric.saturation(some, factor, True), ImageEnhance.Color, 2.0),
    ],
)
def test_jitter_agrees_with_pil(ours, theirs, tolerance: float) -> None:
    images, factors = [picture(n) for n in range(4)], [0.6, 0.9, 1.2, 1.4]
    for image, factor, got in zip(images, factors, ours(floats(images), torch.tensor(factors)), strict=True):
        expected = np.asarray(theirs(Image.fromarray(image)).enhance(factor))
        assert np.abs(levels(got) - expected).max() <= tolerance


def test_hue_agrees_with_colorsys() -> None:
    images = [picture(0, 12, 12), picture(1, 12, 12), np.full((12, 12, 3), 77, np.uint8)]
    images[1][:4] = (255, 0, 0)
    shifts = [-0.1, 0.3, 0.5]
    for image, shift, got in zip(images, shifts, photometric.hue(floats(images), torch.tensor(shifts)), strict=True):
        expected = np.empty((12, 12, 3))
        for at in np.ndindex(12, 12):
            h, s, v = colorsys.rgb_to_hsv(*(image[at] / 255))
            expected[at] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
        np.testing.assert_allclose(levels(got), expected * 255, atol=1e-3)


def test_blur_agrees_with_scipy() -> None:
    images, sigmas = [picture(n) for n in range(3)], [0.1, 1.0, 2.0]
    for image, sigma, got in zip(images, sigmas, photometric.blur(floats(images), torch.tensor(sigmas)), strict=True):
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
        expected = image.astype(np.float64)
        for axis in (0, 1):
            expected = correlate1d(expected, kernel / kernel.sum(), axis, mode="mirror")
        np.testing.assert_allclose(levels(got), expected, atol=1e-3)


def test_grey_and_solarize_agree_with_pil() -> None:
    image = picture()
    grey = photometric.grey(floats([image]), True)[0, 0].numpy() * 255
    assert np.abs(grey - np.asarray(Image.fromarray(image).convert("L"))).max() <= 1
    expected = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
    np.testing.assert_allclose(levels(photometric.solarize(floats([image]))[0]), expected, atol=1e-3)


def by_torchvision(image: Tensor, row: list[float]) -> Tensor:
    """One image (3, H, W), operation after operation."""
    jitters = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    for number in photometric.ORDERS[int(row[photometric.ORDER])]:
        image = jitters[number](image, row[number])
    if row[photometric.GREY]:
        image = functional.rgb_to_grayscale(image, 3)
    if row[photometric.BLUR]:
        image = functional.gaussian_blur(image, [9, 9], [row[photometric.BLUR]])
    return functional.solarize(image, 0.5) if row[photometric.SOLARIZE] else image


def by_numpy(image: np.ndarray, row: list[float]) -> np.ndarray:
    """One image (C, H, W) of any bands, float64."""
    for number in photometric.ORDERS[int(row[photometric.ORDER])]:
        if number < 3:
            other = (0.0, image.mean(), image.mean(0))[number]
            image = (row[number] * image + (1 - row[number]) * other).clip(0, 1)
    if row[photometric.GREY]:
        image = np.stack([image.mean(0)] * len(image))
    if row[photometric.BLUR]:
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / row[photometric.BLUR]) ** 2)
        for axis in (1, 2):
            image = correlate1d(image, kernel / kernel.sum(), axis, mode="mirror")
    return np.where(image >= 0.5, 1 - image, image) if row[photometric.SOLARIZE] else image


def test_a_batch_is_changed_as_torchvision_changes_each_image() -> None:
    images, drawn = floats([picture(seed, 16, 18) for seed in range(60)]), rows(60)
    got = photometric.apply(images.clone(), drawn, colour=True)
    torch.testing.assert_close(got[0], images[0], rtol=0, atol=0)
    for image, row, result in zip(images, drawn.tolist(), got, strict=True):
        torch.testing.assert_close(result, by_torchvision(image, row), rtol=0, atol=2e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_a_batch_of_any_bands_is_changed_as_said(channels: int) -> None:
    images, drawn = floats([picture(seed, 16, 18, channels) for seed in range(60)]), rows(60)
    got = photometric.apply(images.clone(), drawn, colour=False)
    torch.testing.assert_close(got[0], images[0], rtol=0, atol=0)
    for image, row, result in zip(images, drawn.tolist(), got, strict=True):
        np.testing.assert_allclose(result.numpy(), by_numpy(image.numpy().astype(np.float64), row), atol=2e-6)


def test_parts_of_a_batch_that_fit_a_cache_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images, drawn = floats([picture(seed, 16, 18) for seed in range(20)]), rows(20)
    whole = photometric.apply(images.clone(), drawn, colour=True)
    monkeypatch.setattr(photometric, "CPU_VALUES", 3 * images[0].numel())
    torch.testing.assert_close(photometric.apply(images.clone(), drawn, colour=True), whole, rtol=0, atol=1e-6)


def test_views_take_their_bands_for_colour_only_where_they_are() -> None:
    assert Crop().colour
    assert Crop(bands=("red", "green", "blue")).colour
    assert not Crop(bands=("B02", "B03", "B04")).colour
    assert not Crop(bands=(*RGB, "B08")).colour
    # A hue is drawn for any bands, so that rows are the same, and turned for colour only.
    view = Crop(size=16, jitter=(0, 0, 0, 0.4), bands=("B11", "B8A", "B04"), mean=(0,) * 3, std=(1,) * 3)
    raw = {name: value[None] for name, value in view.sample(picture(), Key(0, 0, 1)).items()}
    assert raw["photometric"][0, 3] != 0
    images = raw["image"].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(view.finish(raw)["image"], images)
    assert not torch.allclose(view.model_copy(update={"bands": RGB}).finish(raw)["image"], images, atol=0.01)


def test_effective_probabilities() -> None:
    view, n = MultiCrop(global_size=16, local_size=8, local_crops=2, patch_size=8), 2500
    # Which way an image goes tells a flip: a ramp from dark to bright.
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (40, 40, 3))
    samples = [view.sample(ramp, Key(0, 0, k)) for k in range(n)]

    def likely(hits: Tensor, probability: float) -> None:
        """Within what a fair draw exceeds once in a hundred thousand times."""
        low, high = binom.interval(1 - 1e-5, hits.numel(), probability) if 0 < probability < 1 else (0, 0)
        assert low <= int(hits.sum()) <= high

    rows = {name: torch.stack([sample[f"{name}_photometric"] for sample in samples]) for name in ("global", "local")}
    for group, blur, solarize in (
        (rows["global"][:, 0], 0.0, 0.0),
        (rows["global"][:, 1], 0.9, 0.2),
        (rows["local"], 0.5, 0.0),
    ):
        likely(group[..., photometric.BLUR] != 0, blur)
        likely(group[..., photometric.SOLARIZE] != 0, solarize)
        likely(group[..., photometric.GREY] != 0, 0.2)
        likely(group[..., 0] != 1, 0.8)
    for name in ("global", "local"):
        crops = torch.stack([sample[name] for sample in samples]).int()
        likely(crops[:, :, 0, 0, 0] > crops[:, :, 0, -1, 0], 0.5)
    jittered = rows["global"][rows["global"][..., 0] != 1]
    for column, low, high in ((0, 0.6, 1.4), (1, 0.6, 1.4), (2, 0.8, 1.2), (3, -0.1, 0.1)):
        values = jittered[:, column]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    assert set(jittered[:, photometric.ORDER].long().tolist()) == set(range(24))
    sigmas = rows["local"][..., photometric.BLUR]
    sigmas = sigmas[sigmas != 0]
    assert 0.1 <= sigmas.min() < 0.12
    assert 1.98 < sigmas.max() <= 2.0
