"""Crops, photometrics and masks against PIL, scipy, colorsys and naive versions."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import correlate1d, zoom
from torch import Tensor

from explora.config import validate
from explora.data import Center, Crop, Key, MultiCrop, photometric
from explora.data.masks import block_masks
from explora.data.views import crop_box, resize
from explora.errors import ConfigError

SMALL = {"global_size": 32, "local_size": 16, "local_crops": 3, "patch_size": 8}


def picture(seed: int = 0, height: int = 48, width: int = 60) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (6, 6, 3))
    return zoom(noise, (height / 6, width / 6, 1), order=1).clip(0, 255).astype(np.uint8)


def levels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] to (H, W, 3) in levels of 255, not rounded."""
    return image.permute(1, 2, 0).numpy() * 255


def floats(images: list[np.ndarray]) -> Tensor:
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in images])


def test_key_gives_the_same_numbers_always_and_others_elsewhere() -> None:
    # Written down once: a change would break the resumption of every run.
    assert Key(1, 2, 3).rng(4).integers(1000, size=4).tolist() == [971, 535, 271, 36]
    around = [Key(*numbers).rng(view).random() for *numbers, view in itertools.product((0, 1, 7), repeat=4)]
    assert len(set(around)) == 81


@pytest.mark.parametrize("size", [(20, 33), (96, 96), (31, 7)])
def test_resize_agrees_with_pil(size: tuple[int, int]) -> None:
    image = picture()
    expected = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    got = resize(image, *size).permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_crop_boxes_have_the_asked_area_and_aspect() -> None:
    boxes = [crop_box(Key(0, 0, n).rng(0), 300, 300, (0.1, 0.4)) for n in range(2000)]
    assert all(t >= 0 and lft >= 0 and t + h <= 300 and lft + w <= 300 for t, lft, h, w in boxes)
    areas = np.array([h * w for _, _, h, w in boxes]) / 300**2
    aspects = np.log([w / h for _, _, h, w in boxes])
    assert areas.min() > 0.095
    assert areas.max() < 0.405
    assert areas.mean() == pytest.approx(0.25, abs=0.01)
    assert aspects.mean() == pytest.approx(0, abs=0.02)
    assert aspects.std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), abs=0.01)


def test_crop_box_falls_back_to_the_centre() -> None:
    assert crop_box(Key(0, 0, 0).rng(0), 10, 1000, (1.0, 1.0)) == (0, 493, 10, 13)
    assert crop_box(Key(0, 0, 0).rng(0), 1000, 10, (1.0, 1.0)) == (493, 0, 13, 10)


def test_dihedral_reaches_all_eight_and_flip_only_two() -> None:
    image = np.ascontiguousarray(picture(1, 16, 16))
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    eight = {f.rot90(k, (1, 2)).numpy().tobytes() for f in (pixels, pixels.flip(2)) for k in range(4)}
    for dihedral, expected in (
        (True, eight),
        (False, {pixels.numpy().tobytes(), pixels.flip(2).numpy().tobytes()}),
    ):
        # A square image and scale 1: only the whole image fits, apart from tries whose aspect is not 1.
        view = Crop(size=16, scale=(1, 1), dihedral=dihedral)
        seen = {view.sample(image, Key(0, 0, n))["image"].numpy().tobytes() for n in range(400)}
        assert expected <= seen
        assert not (eight - expected) & seen


def test_center_agrees_with_pil() -> None:
    for height, width in ((60, 48), (48, 60), (20, 31)):
        image = picture(2, height, width)
        got = Center(size=28).sample(image, Key(0, 0, 0))["image"].permute(1, 2, 0).numpy()
        short = min(height, width)
        h, w = int(32 * height / short), int(32 * width / short)
        whole = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
        left, top = round((w - 28) / 2), round((h - 28) / 2)
        expected = np.asarray(whole.crop((left, top, left + 28, top + 28)))
        assert np.abs(got.astype(int) - expected).max() <= 1


def test_finish_normalises() -> None:
    view = Center(size=8, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    raw = {"image": torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), "label": torch.arange(5)}
    done = view.finish(raw)
    assert done.keys() == view.names()
    assert done["image"].dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(view.mean, view.std, strict=True)):
        torch.testing.assert_close(done["image"][:, channel], (raw["image"][:, channel] / 255 - mean) / std)


# Tolerances in levels of 255: PIL rounds its grey and its result, we do not.
@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        (photometric.brightness, ImageEnhance.Brightness, 1.0),
        (photometric.contrast, ImageEnhance.Contrast, 2.0),
        (photometric.saturation, ImageEnhance.Color, 2.0),
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
    grey = photometric.grey(floats([image]))[0, 0].numpy() * 255
    assert np.abs(grey - np.asarray(Image.fromarray(image).convert("L"))).max() <= 1
    expected = np.asarray(ImageOps.solarize(Image.fromarray(image), 128))
    np.testing.assert_allclose(levels(photometric.solarize(floats([image]))[0]), expected, atol=1e-3)


def test_apply_follows_each_row() -> None:
    n = 40
    images = floats([picture(seed, 16, 16) for seed in range(n)])
    rows = torch.stack(
        [
            photometric.draw(
                Key(3, 0, k).rng(0),
                jitter=(0.4, 0.4, 0.2, 0.1),
                jitter_probability=0.8,
                grey=0.2,
                blur=0.5,
                solarize=0.2,
            )
            for k in range(n)
        ]
    )
    rows[0] = torch.tensor(photometric.IDENTITY)
    jitters = (photometric.brightness, photometric.contrast, photometric.saturation, photometric.hue)
    got = photometric.apply(images.clone(), rows)
    torch.testing.assert_close(got[0], images[0], rtol=0, atol=0)
    for image, row, result in zip(images, rows, got, strict=True):
        image = image[None]
        for number in photometric.ORDERS[int(row[photometric.ORDER])]:
            image = jitters[number](image, row[number : number + 1])
        if row[photometric.GREY]:
            image = photometric.grey(image).expand_as(image)
        if row[photometric.BLUR]:
            image = photometric.blur(image, row[photometric.BLUR : photometric.BLUR + 1])
        if row[photometric.SOLARIZE]:
            image = photometric.solarize(image)
        torch.testing.assert_close(result, image[0], rtol=1e-5, atol=1e-5)


def test_effective_probabilities() -> None:
    view = MultiCrop(**SMALL)
    image = picture(0, 40, 40)
    rows = [view.sample(image, Key(0, 0, n)) for n in range(1500)]
    whole = torch.stack([row["global_photometric"] for row in rows])
    local = torch.stack([row["local_photometric"] for row in rows])

    def share(rows: Tensor, column: int) -> float:
        return (rows[..., column] != photometric.IDENTITY[column]).float().mean().item()

    for group, blur, solarize in ((whole[:, 0], 0.0, 0.0), (whole[:, 1], 0.9, 0.2), (local, 0.5, 0.0)):
        assert share(group, photometric.BLUR) == pytest.approx(blur, abs=0.04 if blur else 0)
        assert share(group, photometric.SOLARIZE) == pytest.approx(solarize, abs=0.04 if solarize else 0)
        assert share(group, photometric.GREY) == pytest.approx(0.2, abs=0.04)
        assert share(group, 0) == pytest.approx(0.8, abs=0.04)
    jittered = whole[whole[..., 0] != 1]
    assert jittered[:, :2].min() >= 0.6
    assert jittered[:, :2].max() <= 1.4
    assert jittered[:, 3].abs().max() <= 0.1
    assert set(jittered[:, photometric.ORDER].long().tolist()) == set(range(24))


def test_multicrop_batch() -> None:
    view = MultiCrop(**SMALL)
    samples = [view.sample(picture(n), Key(0, 0, n)) for n in range(4)]
    assert samples[0]["global"].dtype == torch.uint8
    raw = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]} | view.step(0, 0, 4)
    done = view.finish(raw)
    assert done.keys() == view.names()
    assert done["global"].shape == (2, 4, 3, 32, 32)
    assert done["local"].shape == (3, 4, 3, 16, 16)
    assert done["mask"].shape == (2, 4, 16)
    assert torch.equal(done["mask"][1, 2], raw["mask"][2, 1])
    alone = photometric.apply(samples[2]["local"][1:2] / 255, samples[2]["local_photometric"][1:2])
    torch.testing.assert_close(done["local"][1, 2], view.normalise(alone)[0], rtol=1e-5, atol=1e-5)


def test_views_of_an_image_differ_and_repeat() -> None:
    view, image = MultiCrop(**SMALL), picture()
    first, again, other = (view.sample(image, Key(0, epoch, 5)) for epoch in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["global"], other["global"])
    assert not torch.equal(first["global"][0], first["global"][1])


@pytest.mark.parametrize(("images", "grid"), [(16, (14, 14)), (7, (4, 4)), (1, (2, 2)), (64, (6, 9))])
def test_mask_counts_are_exact(images: int, grid: tuple[int, int]) -> None:
    n = grid[0] * grid[1]
    masked = int(images * 0.5)
    edges = np.linspace(0.1, 0.5, masked + 1)[1:] if masked else []
    expected = [0] * (images - masked) + [int(n * edge) for edge in edges]
    for seed in range(20):
        masks = block_masks(np.random.default_rng(seed), images, grid, 0.5, (0.1, 0.5))
        assert masks.shape == (images, n)
        assert sorted(masks.sum(1)) == sorted(expected)


def test_masks_come_in_blocks_and_any_place() -> None:
    masks = block_masks(np.random.default_rng(0), 400, (14, 14), 1.0, (0.3, 0.3)).reshape(-1, 14, 14)
    assert (masks.sum((1, 2)) == 58).all()
    # Neighbours agree far more often than for single patches, where the share is .3^2 + .7^2.
    agree = (masks[:, 1:] == masks[:, :-1]).mean()
    assert agree > 0.8
    # Corners lie in few rectangles, but no place is always or never hidden.
    assert masks.mean(0).min() > 0.01
    assert masks.mean(0).max() < 0.6
    assert block_masks(np.random.default_rng(0), 3, (4, 4), 1.0, (1.0, 1.0)).all()


@pytest.mark.parametrize(
    ("kind", "raw", "words"),
    [
        (MultiCrop, {"global_size": 225, "patch_size": 16}, "multiple of patch_size 16; nearest: 224 and 240"),
        (MultiCrop, {"patch_size": 14}, "local_size 96 .* nearest: 84 and 98"),
        (MultiCrop, {"patch_size": 2, "local_size": 4}, "too small to blur"),
        (MultiCrop, {"mask_ratio": [0.5, 0.1]}, "mask_ratio must go"),
        (MultiCrop, {"grey": 1.5}, "grey"),
        (MultiCrop, {"jitter": [0.4, 0.4, 0.2, 0.6]}, "jitter"),
        (Crop, {"scale": [0, 0]}, "scale must go"),
        (Crop, {"std": [1, 0, 1]}, "above 0"),
        (Center, {"size": 224, "resize": 200}, "smaller than size"),
    ],
)
def test_bad_configs_are_refused(kind, raw: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(kind, raw)
