"""Crops of any number of channels against PIL and torchvision; masks against their counts."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import zoom
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from explora.bands import RGB
from explora.config import validate
from explora.data import Center, Crop, Key, MaskedCrop, MultiCrop, Views, photometric, synthetic
from explora.data.geometry import NUMBERS, Box, RandomCrop, crop_box, resize
from explora.data.masks import block_masks
from explora.errors import ConfigError

SMALL = {"global_size": 32, "local_size": 16, "local_crops": 3, "patch_size": 8}


def picture(seed: int = 0, height: int = 48, width: int = 60, channels: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0, 255, (6, 6, channels))
    return zoom(noise, (height / 6, width / 6, 1), order=1).clip(0, 255).astype(np.uint8)


def numbers(sample: int) -> list[float]:
    return Key(0, 0, sample).numbers(1)[0]


def by_pil(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each channel by itself, int (height, width, C)."""
    channels = (Image.fromarray(image[..., c]) for c in range(image.shape[2]))
    resized = [np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels]
    return np.stack(resized, -1).astype(int)


def test_key_gives_the_same_numbers_always_and_others_elsewhere() -> None:
    # Written down once: a change would break the resumption of every run.
    assert Key(1, 2, 3).rng(4).integers(1000, size=4).tolist() == [971, 535, 271, 36]
    around = [Key(*numbers).rng(view).random() for *numbers, view in itertools.product((0, 1, 7), repeat=4)]
    assert len(set(around)) == 81


def test_numbers_of_a_view_do_not_hang_on_how_many_follow() -> None:
    assert Key(1, 2, 3).numbers(10)[:2] == Key(1, 2, 3).numbers(2)
    assert Key(1, 2, 3).numbers(1) != Key(1, 2, 4).numbers(1)


def test_a_key_gives_the_same_crop_and_row_always() -> None:
    # Written down once, as above.
    one, other = Key(1, 2, 3).numbers(2)
    assert crop_box(one, 100, 120, (0.2, 1.0)) == Box(13, 36, 52, 64)
    assert crop_box(other, 100, 120, (0.2, 1.0)) == Box(2, 56, 56, 44)
    row = photometric.draw(
        one[NUMBERS:], jitter=(0.4, 0.4, 0.2, 0.1), jitter_probability=0.8, grey=0.2, blur=0.5, solarize=0.2
    )
    assert row == pytest.approx([1.3873, 1.2599, 1.1971, -0.016, 3, 0, 0.2406, 0], abs=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_resize_agrees_with_pil(channels: int) -> None:
    image = picture(channels=channels)
    for size in ((20, 33), (96, 96), (31, 7), (48, 60)):
        got = resize(image, *size)
        assert got.dtype == torch.uint8
        assert np.abs(got.numpy() - by_pil(image, *size)).max() <= 1


@pytest.mark.parametrize("channels", [3, 13])
def test_all_but_one_value_of_noise_in_ten_thousand_is_within_a_level_of_pil(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (150, 180, channels), dtype=np.uint8)
    off = []
    for crop in (RandomCrop(112, (0.32, 1.0), 0, False), RandomCrop(48, (0.05, 0.32), 0, False)):
        for n in range(15):
            top, left, height, width = crop_box(numbers(n), 150, 180, crop.scale)
            # Across, then down, as PIL did it always before 13.0: what is clipped in between shows in noise.
            across = by_pil(image[top : top + height, left : left + width], height, crop.size).astype(np.uint8)
            off.append(np.abs(crop.cut(image, numbers(n)).numpy() - by_pil(across, crop.size, crop.size)).ravel())
    assert (np.concatenate(off) <= 1).mean() >= 0.9999


def test_all_but_one_value_of_pictures_in_ten_thousand_is_within_a_level_of_pil() -> None:
    off = []
    for kind, name in [(kind, name) for kind, names in synthetic.CLASSES.items() for name in names]:
        image = synthetic.render(kind, name, np.random.default_rng(0), 160)
        for n, crop in enumerate([RandomCrop(112, (0.32, 1.0), 0, False), RandomCrop(48, (0.05, 0.32), 0, False)] * 3):
            top, left, height, width = crop_box(numbers(n), 160, 160, crop.scale)
            expected = by_pil(image[top : top + height, left : left + width], crop.size, crop.size)
            off.append(np.abs(crop.cut(image, numbers(n)).numpy() - expected).ravel())
    assert (np.concatenate(off) <= 1).mean() >= 0.9999


@pytest.mark.parametrize(("height", "width"), [(300, 300), (60, 100), (20, 90)])
def test_crop_boxes_fall_as_those_of_torchvision(height: int, width: int) -> None:
    torch.manual_seed(0)
    blank = torch.empty(1, height, width)
    theirs = [RandomResizedCrop.get_params(blank, [0.1, 0.8], [3 / 4, 4 / 3]) for _ in range(3000)]
    ours = [crop_box(numbers(n), height, width, (0.1, 0.8)) for n in range(3000)]

    def facts(boxes: list) -> np.ndarray:
        top, left, h, w = np.array(boxes, dtype=float).T
        return np.stack([top, left, h, w, h * w, w / h])

    for one, other in zip(facts(ours), facts(theirs), strict=True):
        assert ks_2samp(one, other).pvalue > 1e-4


def test_crop_box_falls_back_to_the_centre() -> None:
    assert crop_box(numbers(0), 10, 1000, (1.0, 1.0)) == Box(0, 493, 10, 13)
    assert crop_box(numbers(0), 1000, 10, (1.0, 1.0)) == Box(493, 0, 13, 10)


def test_dihedral_reaches_all_eight_and_flip_only_two() -> None:
    image = np.ascontiguousarray(picture(1, 16, 16))
    eight = {np.rot90(f, k).tobytes() for f in (image, image[:, ::-1]) for k in range(4)}
    for dihedral, expected in (
        (True, eight),
        (False, {image.tobytes(), image[:, ::-1].tobytes()}),
    ):
        # A square image and scale 1: only the whole image fits, apart from tries whose aspect is not 1.
        view = Crop(size=16, scale=(1, 1), dihedral=dihedral)
        seen = {view.sample(image, Key(0, 0, n))["image"].numpy().tobytes() for n in range(400)}
        assert expected <= seen
        assert not (eight - expected) & seen


def test_center_agrees_with_pil() -> None:
    for height, width in ((60, 48), (48, 60), (20, 31)):
        image = picture(2, height, width)
        got = Center(size=28).sample(image, Key(0, 0, 0))["image"].numpy()
        short = min(height, width)
        h, w = int(32 * height / short), int(32 * width / short)
        whole = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
        left, top = round((w - 28) / 2), round((h - 28) / 2)
        expected = np.asarray(whole.crop((left, top, left + 28, top + 28)))
        assert np.abs(got.astype(int) - expected).max() <= 1


def test_finish_normalises() -> None:
    view = Center(size=8, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    raw = {"image": torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8), "label": torch.arange(5)}
    done = view.finish(raw)
    assert done.keys() == view.names()
    assert done["image"].dtype == torch.float32
    for channel, (mean, std) in enumerate(zip(view.mean, view.std, strict=True)):
        torch.testing.assert_close(done["image"][:, channel], (raw["image"][..., channel] / 255 - mean) / std)


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
    crop = samples[2]["local"][1:2].permute(0, 3, 1, 2) / 255
    alone = photometric.apply(crop, samples[2]["local_photometric"][1:2], colour=True)
    torch.testing.assert_close(done["local"][1, 2], view.normalise(alone)[0], rtol=1e-5, atol=1e-5)


def test_views_of_an_image_differ_and_repeat() -> None:
    view, image = MultiCrop(**SMALL), picture()
    first, again, other = (view.sample(image, Key(0, epoch, 5)) for epoch in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["global"], other["global"])
    assert not torch.equal(first["global"][0], first["global"][1])


@pytest.mark.parametrize("bands", [("VV",), ("VV", "VH"), (*RGB, "B08"), tuple(f"band{n}" for n in range(13))])
@pytest.mark.parametrize(
    "view",
    [
        Center(size=16),
        Crop(size=16, jitter=(0.4, 0.4, 0.2, 0.1)),
        MaskedCrop(size=16, patch_size=8),
        MultiCrop(**SMALL),
    ],
    ids=lambda view: view.name,
)
def test_any_bands_become_views(view: Views, bands: tuple[str, ...]) -> None:
    channels = len(bands)
    given = {"bands": bands, "mean": [0.4] * channels, "std": [0.2] * channels, "dihedral": True}
    if isinstance(view, Center):
        del given["dihedral"]
    view = validate(type(view), view.model_dump(exclude_unset=True) | given)
    assert not view.colour
    samples = [view.sample(picture(n, channels=channels), Key(0, 0, n)) for n in range(3)]
    raw = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]} | view.step(0, 0, 3)
    for name, images in view.finish(raw).items():
        if name in ("image", "global", "local"):
            assert images.shape[-3] == channels
            assert images.isfinite().all()
            assert view.pixels(images.flatten(0, -4)).shape[1:] == (*images.shape[-2:], 3)


def test_each_channel_is_cut_and_finished_as_if_alone() -> None:
    image = picture(channels=13)
    view = MaskedCrop(size=24, patch_size=8, dihedral=True, mean=(0.0,) * 13, std=(1.0,) * 13)
    alone = MaskedCrop(size=24, patch_size=8, dihedral=True, mean=(0.0,), std=(1.0,))
    for key in (Key(0, 0, n) for n in range(6)):
        finished = view.finish({"image": view.sample(image, key)["image"][None]})["image"]
        for channel in range(13):
            crop = alone.sample(image[..., channel : channel + 1], key)["image"][None]
            torch.testing.assert_close(finished[:, channel : channel + 1], alone.finish({"image": crop})["image"])


def test_pixels_are_what_people_can_look_at() -> None:
    levels = torch.randint(256, (2, 5, 4, 4))
    bands = ("B08", "B02", "B03", "B04", "B11")
    for channels, names, shown in (
        (5, bands, [3, 2, 1]),
        (5, ("a", "b", "c", "d", "e"), [0, 1, 2]),
        (3, RGB, [0, 1, 2]),
        (2, ("VV", "VH"), [0, 0, 0]),
        (1, ("VV",), [0, 0, 0]),
    ):
        view = Center(bands=names, mean=np.linspace(0.3, 0.5, channels), std=np.linspace(0.1, 0.3, channels))
        images = view.normalise(levels[:, :channels] / 255)
        np.testing.assert_array_equal(view.pixels(images), levels[:, shown].permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("view", [Center(size=16), Crop(size=16), MaskedCrop(size=16), MultiCrop(**SMALL)])
def test_an_image_may_be_decoded_so_small_that_no_crop_is_enlarged(view: Views) -> None:
    assert view.needed() == 0
    least = view.model_copy(update={"scaled_decode": True}).needed()
    assert least == view.enough() >= max(view.sides())
    crops = [view._crop] if isinstance(view, Crop | MaskedCrop) else []
    for crop in view._crops.values() if isinstance(view, MultiCrop) else crops:
        for height, width in ((least, least), (least, 3 * least), (2 * least, least)):
            boxes = [crop_box(numbers(n), height, width, crop.scale) for n in range(300)]
            assert min(min(box.height, box.width) for box in boxes) >= crop.size


def test_crops_as_small_as_can_be_need_the_whole_image() -> None:
    assert MaskedCrop(size=16, scale=(0, 1), scaled_decode=True).needed() > 1000


def test_the_same_numbers_give_the_same_part_at_any_resolution() -> None:
    for n in range(100):
        whole = np.array(crop_box(numbers(n), 1000, 1200, (0.2, 0.6)))
        assert np.abs(whole - 4 * np.array(crop_box(numbers(n), 250, 300, (0.2, 0.6)))).max() <= 6


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
        (Crop, {"bands": ["VV", "VH"], "mean": [0, 0, 0], "std": [1, 1, 1]}, "3 channels, but 2 bands are named: VV"),
        (Crop, {"mean": [0, 0]}, "mean has 2 channels and std 3"),
        (Center, {"size": 224, "resize": 200}, "smaller than size"),
    ],
)
def test_bad_configs_are_refused(kind, raw: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(kind, raw)
