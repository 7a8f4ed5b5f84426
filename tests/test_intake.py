"""Stored pixels to levels: closed forms, SatMAE's formula, missing pixels; wrong scales are refused before training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from explora.bands import PHOTOGRAPH, RGB, Band, Pixels, Scaling, Statistics, sentinel2
from explora.data.intake import Intake, normalisation, refuse_strange, settle, whole_range
from explora.data.statistics import Tally
from explora.data.views import Center, Views
from explora.errors import ConfigError, DataError

SHARED = Path(os.environ.get("EXPLORA_SHARED", "../shared"))
EUROSAT = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
LEAST = float(np.finfo(np.float32).min)
SATMAE = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12")


def views(bands: tuple[str, ...] = RGB, scaling: Any = None) -> Views:
    half = (0.5,) * len(bands)
    return Center(bands=bands, scaling=scaling, mean=half, std=half)


def said(names: tuple[str, ...], dtype: Any = "uint16", **meaning: Any) -> Pixels:
    return Pixels(bands=sentinel2(names), dtype=dtype, **{"unit": "dn", "scale": 1} | meaning)


def known(pixels: Pixels, images: list[np.ndarray]) -> Pixels:
    """The same with statistics."""
    tally = Tally(pixels)
    for image in images:
        tally.add(image)
    bands = zip(pixels.bands, tally.statistics(), strict=True)
    return pixels.model_copy(update={"bands": tuple(b.model_copy(update={"statistics": s}) for b, s in bands)})


def sentinel(count: int = 40, seed: int = 0) -> list[np.ndarray]:
    """Made images with the statistics of Sentinel-2: RGB in dn, one image brighter than the other."""
    rng = np.random.default_rng(seed)
    means = rng.normal((950, 1040, 1120), (450, 300, 250), (count, 3)).clip(300)
    return [rng.normal(mean, 150, (24, 20, 3)).clip(1).astype(np.uint16) for mean in means]


class Shards:
    """What `refuse_strange` needs of packed shards."""

    folder = Path("there")

    def __init__(self, pixels: Pixels, images: list[np.ndarray]) -> None:
        self.pixels, self.images = pixels, images
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        self.read.append(index)
        if self.images[index].size == 0:
            raise DataError("unreadable")
        return self.images[index]


def test_photographs_pass_as_they_are() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for scaling in (None, "levels", whole_range(RGB)):
        assert Intake(PHOTOGRAPH, views(scaling=scaling))(image) is image
    swapped = Intake(PHOTOGRAPH, views(("blue", "red")))(image)
    np.testing.assert_array_equal(swapped, image[..., [2, 0]])


def test_levels_follow_from_low_and_high_with_scale_and_offset() -> None:
    """reflectance = (dn - 1000) / 10000, 0.02 to 0.22 are all levels."""
    pixels = said(("B04", "B08"), unit="reflectance", scale=1e-4, offset=-0.1)
    scaling = Scaling(unit="reflectance", low=(0.02,), high=(0.22,))
    image = np.arange(900, 3900, 2, dtype=np.uint16).reshape(30, 25, 2)
    expected = np.rint(((image[..., 1:] * 1e-4 - 0.1 - 0.02) / 0.2 * 255).clip(0, 255))
    found = Intake(pixels, views(("nir",), scaling))(image)
    assert found.dtype == np.uint8
    assert found.shape == (30, 25, 1)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected).mean() > 0.99
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_every_type_is_scaled_alike_and_any_width_may_follow_any(dtype: Any) -> None:
    scaling = Scaling(unit="dn", low=(10.0, 20.0), high=(110.0, 220.0))
    intake = Intake(said(("B04", "B08"), dtype), views(("B08", "B04"), scaling))
    for width in (3, 9, 9, 4):
        image = np.random.default_rng(width).integers(0, 128, (6, width, 2)).astype(dtype)
        swapped = image[..., ::-1].astype(float)
        expected = ((swapped - (10, 20)) / (100, 200) * 255).clip(0, 255)
        np.testing.assert_allclose(intake(image), expected, atol=0.51)


@pytest.mark.parametrize(
    ("dtype", "nodata", "holes"),
    [("uint16", 0, [0]), ("int16", -9999, [-9999]), ("float32", LEAST, [LEAST, np.nan])],
)
def test_missing_pixels_become_the_mean(dtype: Any, nodata: float, holes: list[float]) -> None:
    scaling = Scaling(unit="dn", low=(100.0, 100.0), high=(200.0, 200.0))
    chosen = views(("B02", "B03"), scaling).model_copy(update={"mean": (0.25, 0.75)})
    image = np.full((4, 5, 2), 150, dtype)
    for number, hole in enumerate(holes):
        image[number, :2] = hole
    found = Intake(said(("B02", "B03"), dtype, nodata=nodata), chosen)(image)
    expected = np.full(image.shape, 128)
    expected[: len(holes), :2] = (64, 191)
    np.testing.assert_array_equal(found, expected)
    assert (np.abs(found[0, 0] / 255 - (0.25, 0.75)) < 1 / 255).all()


def test_missing_pixels_of_photographs_become_the_mean() -> None:
    image = np.full((4, 5, 3), 200, np.uint8)
    image[0] = 0
    pixels = PHOTOGRAPH.model_copy(update={"nodata": 0.0})
    found = Intake(pixels, views())(image)
    assert (found[0] == 128).all()
    assert (found[1:] == 200).all()


def test_what_does_not_fit_the_set_is_refused() -> None:
    reflectance = Scaling(unit="reflectance", low=(0.0,), high=(1.0,))
    with pytest.raises(DataError, match="bands B08 are not among those of the images: B02"):
        Intake(said(("B02",)), views(("nir",), reflectance))
    with pytest.raises(ConfigError, match=r"is in reflectance, but the images hold values in dn; give views\.scaling"):
        Intake(said(("B02",)), views(("B02",), reflectance))
    with pytest.raises(ConfigError, match="has numbers for 1 bands, but there are 2"):
        Intake(said(("B02", "B03"), unit="reflectance"), views(("B02", "B03"), reflectance))
    with pytest.raises(ConfigError, match="sigma has not been settled for images of uint16"):
        Intake(said(("B02",)), views(("B02",), "sigma"))
    with pytest.raises(ConfigError, match=r"views\.mean: 3 numbers for 1 bands"):
        Intake(said(("B02",), nodata=0), Center(bands=("B02",), scaling=Scaling(unit="dn", low=(0.0,), high=(1.0,))))


def test_photographs_settle_on_all_levels() -> None:
    for rule in (None, "levels"):
        assert settle(views(scaling=rule), PHOTOGRAPH).scaling == whole_range(RGB)
    settled = settle(views(), PHOTOGRAPH)
    assert settle(settled, PHOTOGRAPH) == settled
    counts = PHOTOGRAPH.model_copy(update={"unit": "dn", "scale": 2.0, "offset": 10.0})
    assert settle(views(("B02",)), counts).scaling == Scaling(unit="dn", low=(10.0,), high=(520.0,))


def test_sigma_and_percentiles_are_in_values_not_in_stored_numbers() -> None:
    numbers = Statistics(mean=1500, std=200, p1=1010, p2=1050, p98=2000, p99=2100)
    pixels = said(("B02", "B03"), unit="reflectance", scale=1e-4, offset=-0.1)
    pixels = pixels.model_copy(update={"bands": (pixels.bands[0], Band(name="B03", statistics=numbers))})
    sigma = settle(views(("green",)), pixels).scaling
    assert isinstance(sigma, Scaling)
    assert sigma.unit == "reflectance"
    assert (*sigma.low, *sigma.high) == pytest.approx((0.01, 0.09))
    percentiles = settle(views(("green",), "percentiles"), pixels).scaling
    assert isinstance(percentiles, Scaling)
    assert (*percentiles.low, *percentiles.high) == pytest.approx((0.005, 0.1))
    assert normalisation(pixels, sigma, ("B03",)) == (pytest.approx((0.5,)), pytest.approx((0.25,)))
    mean, std = normalisation(pixels, percentiles, ("B03",))
    assert (*mean, *std) == pytest.approx((0.045 / 0.095, 0.02 / 0.095))


def test_what_the_config_says_comes_before_what_the_backbone_knows() -> None:
    pixels = known(said(RGB), sentinel())
    recorded = Scaling(unit="dn", low=(0.0,) * 3, high=(3000.0,) * 3)
    given = Scaling(unit="dn", low=(5.0,) * 3, high=(2000.0,) * 3)
    assert settle(views(), pixels, recorded).scaling == recorded
    assert settle(views(scaling=given), pixels, recorded).scaling == given
    assert settle(views(scaling="sigma"), pixels, recorded).scaling not in (recorded, given)
    with pytest.raises(ConfigError, match="backbone was trained with a scaling that is in level, but the images hold"):
        settle(views(), pixels, whole_range(RGB))


def test_rules_that_cannot_be_followed_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="levels takes 8-bit images as they are, but these are uint16; use sigma"):
        settle(views(scaling="levels"), said(RGB))
    with pytest.raises(DataError, match="no statistics of bands B04, B03, B02; run `explora stats FOLDER`"):
        settle(views(), said(RGB))
    with pytest.raises(DataError, match="no statistics of bands B02"):
        normalisation(said(("B02",)), Scaling(unit="dn", low=(0.0,), high=(1.0,)), ("B02",))
    with pytest.raises(DataError, match="bands B08 are not among"):
        settle(views(("B08",)), said(RGB))


@pytest.mark.parametrize("rule", ["sigma", "percentiles"])
def test_a_band_that_is_the_same_everywhere_spans_one_stored_step(rule: str) -> None:
    image = np.full((4, 4, 1), 7, np.uint16)
    pixels = known(said(("B10",), scale=0.5, offset=3.0), [image])
    settled = settle(views(("B10",), rule), pixels)
    assert settled.scaling == Scaling(unit="dn", low=(6.25,), high=(6.75,))
    assert normalisation(pixels, settled.scaling, ("B10",)) == ((0.5,), (0.25,))
    assert (Intake(pixels, settled)(image) == 128).all()


def satmae(image: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Cong et al. 2022: mean +- 2 std to 8 bits, band by band, cut and not rounded."""
    low, high = mean - 2 * std, mean + 2 * std
    return ((image - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)


def test_sigma_is_what_satmae_does_on_real_tiles() -> None:
    paths = sorted((SHARED / "data/eurosat100/tif").rglob("*.tif"))
    if not paths:
        pytest.skip("no data/eurosat100/tif in $EXPLORA_SHARED")
    images = [tifffile.imread(path) for path in paths]
    pixels, values = known(said(EUROSAT), images), np.stack(images).astype(float)
    settled = settle(views(SATMAE), pixels)
    assert isinstance(settled.scaling, Scaling)
    picked = [EUROSAT.index(name) for name in SATMAE]
    mean, std = values.mean((0, 1, 2))[picked], values.std((0, 1, 2))[picked]
    intake = Intake(pixels, settled)
    for image in images[::20]:
        found, expected = intake(image).astype(int), satmae(image[..., picked], mean, std)
        assert set(np.unique(found - expected)) <= {0, 1}
    means, stds = normalisation(pixels, settled.scaling, SATMAE)
    assert means == pytest.approx((0.5,) * 10)
    assert stds == pytest.approx((0.25,) * 10)
    refuse_strange(Shards(pixels, images), settled)  # type: ignore[arg-type]


def test_a_set_that_is_what_it_says_passes() -> None:
    images = sentinel()
    for rule in ("sigma", "percentiles", Scaling(unit="dn", low=(0.0,) * 3, high=(10_000.0,) * 3)):
        pixels = known(said(RGB), images)
        shards = Shards(pixels, images)
        refuse_strange(shards, settle(views(scaling=rule), pixels), count=8)  # type: ignore[arg-type]
        assert len(shards.read) == 8
        assert np.abs(np.array(shards.read) // 5 - np.arange(8)).max() == 0


WRONG: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "divided by 10000": (lambda image: image / np.float32(10_000), "float32"),
    "offset of +1000": (lambda image: image + np.uint16(1000), "uint16"),
    "offset of -1000": (lambda image: (image.astype(int) - 1000).clip(0).astype(np.uint16), "uint16"),
    "8-bit": (lambda image: (image // 12).clip(0, 255).astype(np.uint16), "uint16"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_scale_is_refused(wrong: str) -> None:
    change, dtype = WRONG[wrong]
    pixels = known(said(RGB), sentinel()).model_copy(update={"dtype": dtype})
    shards: Any = Shards(pixels, [change(image) for image in sentinel()])
    with pytest.raises(
        DataError, match=r"band B0\d: .*% of the values in 40 images .*`explora stats`.*again with --pixels"
    ):
        refuse_strange(shards, settle(views(), pixels))


def test_a_scaling_for_other_values_is_refused_without_statistics() -> None:
    scaling = Scaling(unit="dn", low=(0.0,) * 3, high=(0.3,) * 3)
    shards: Any = Shards(said(RGB), sentinel())
    message = "views.scaling clips 100% of the values in 40 images to 0 or 1, as they are not in 0 to 0.3 dn"
    with pytest.raises(DataError, match=f"there: band B04: {message}"):
        refuse_strange(shards, views(scaling=scaling))
    # What the views do not take may be anything.
    pixels = said(("B10", *RGB))
    images = [np.dstack([image[..., :1] * 0, image]) for image in sentinel()]
    wide = Scaling(unit="dn", low=(0.0,) * 3, high=(4000.0,) * 3)
    shards = Shards(pixels, images)
    refuse_strange(shards, views(scaling=wide))


@pytest.mark.parametrize(("added", "passes"), [(1000, True), (0, False)])
def test_clipping_is_counted_in_units_with_the_offset(added: int, passes: bool) -> None:
    """Sentinel-2 of baseline 04.00: reflectance = (dn - 1000) / 10000; without these 1000 all would be below zero."""
    images = [image + np.uint16(added) for image in sentinel()]
    pixels = said(RGB, unit="reflectance", scale=1e-4, offset=-0.1)
    shards: Any = Shards(pixels, images)
    scaling = Scaling(unit="reflectance", low=(0.01,) * 3, high=(0.16,) * 3)
    if passes:
        refuse_strange(shards, views(scaling=scaling))
    else:
        with pytest.raises(DataError, match=r"band B04: views.scaling clips .* not in 0.01 to 0.16 reflectance"):
            refuse_strange(shards, views(scaling=scaling))


def test_a_range_that_leaves_nothing_is_refused() -> None:
    """Numbers in counts where the images are in reflectance: nothing is clipped, and all becomes black."""
    images = sentinel()
    pixels = known(said(RGB, unit="reflectance", scale=1e-4), images)
    shards: Any = Shards(pixels, images)
    with pytest.raises(DataError, match=r"of 255 levels between the 2nd and the 98th percentile of any band; is it in"):
        refuse_strange(shards, views(scaling=Scaling(unit="reflectance", low=(0.0,) * 3, high=(3000.0,) * 3)))
    refuse_strange(shards, views(scaling=Scaling(unit="reflectance", low=(0.0,) * 3, high=(1.0,) * 3)))


def test_black_and_white_photographs_are_not_clipped_by_levels() -> None:
    images = [np.full((4, 4, 3), level, np.uint8) for level in (0, 255, 255)]
    shards: Any = Shards(PHOTOGRAPH, images)
    for chosen in (views(), settle(views(), PHOTOGRAPH)):
        refuse_strange(shards, chosen)


def test_floats_that_are_all_alike_are_not_strange() -> None:
    images = [np.full((4, 4, 1), 1000.3, np.float32)] * 3
    pixels = known(said(("B02",), "float32"), images)
    shards: Any = Shards(pixels, images)
    refuse_strange(shards, settle(views(("B02",)), pixels))


def test_missing_and_unreadable_pixels_say_nothing() -> None:
    images = sentinel()
    pixels = known(said(RGB, nodata=0), images)
    for image in images:
        image[:20] = 0
    images[::2] = [image[:0] for image in images[::2]]
    shards: Any = Shards(pixels, images)
    refuse_strange(shards, settle(views(), pixels))
    shards = Shards(pixels, [image[:0] for image in images])
    refuse_strange(shards, settle(views(), pixels))


def test_large_images_are_looked_at_sparsely() -> None:
    images = [np.tile(image, (30, 40, 1)) for image in sentinel(4)]
    pixels = known(said(RGB), images)
    shards: Any = Shards(pixels, images)
    refuse_strange(shards, settle(views(), pixels))
