"""One-pass statistics against numpy over all values at once, and against what others published."""

from __future__ import annotations

import io
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from explora.bands import Band, Pixels, Statistics, sentinel2
from explora.data.statistics import Tally, present
from explora.errors import DataError

SHARED = Path(os.environ.get("EXPLORA_SHARED", "../shared"))
# The order of bands in the tifs of EuroSAT, and means of torchgeo over its 27000 images.
EUROSAT = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
PUBLISHED = (1354.4, 1118.2, 1042.9, 947.6, 1199.5, 1999.8, 2369.2, 2296.8, 732.1, 12.1, 1819.0, 1118.9, 2594.1)


def said(bands: int, dtype: Any, nodata: float | None = None) -> Pixels:
    names = tuple(Band(name=f"x{i}") for i in range(bands))
    return Pixels(bands=names, dtype=dtype, unit="dn", scale=1, nodata=nodata)


def some(dtype: str, count: int = 6, bands: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    far = {"uint8": (120, 60), "uint16": (3000, 1500), "int16": (-200, 4000), "float32": (-12, 6)}[dtype]
    bounds = (-np.inf, np.inf) if dtype == "float32" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    shapes = [(int(rng.integers(5, 40)), int(rng.integers(5, 40)), bands) for _ in range(count)]
    return [rng.normal(*far, shape).clip(*bounds).astype(dtype) for shape in shapes]


def tallied(pixels: Pixels, images: list[np.ndarray]) -> Tally:
    tally = Tally(pixels)
    for image in images:
        tally.add(image)
    return tally


def of_numpy(values: np.ndarray) -> dict[str, float]:
    # Those of floats are of the value at or below a rank; whole numbers have straight lines in between.
    method: Any = "lower" if values.dtype == np.float32 else "linear"
    p1, p2, p98, p99 = np.percentile(values.astype(np.float64), [1, 2, 98, 99], method=method)
    return {
        "mean": values.mean(dtype=float),
        "std": values.std(dtype=float),
        "p1": p1,
        "p2": p2,
        "p98": p98,
        "p99": p99,
    }


def column(images: list[np.ndarray], band: int) -> np.ndarray:
    return np.concatenate([image[..., band].ravel() for image in images])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_whole_numbers_give_what_numpy_gives(dtype: str) -> None:
    images = some(dtype)
    for band, found in enumerate(tallied(said(3, dtype), images).statistics()):
        assert found is not None
        assert found.model_dump() == pytest.approx(of_numpy(column(images, band)), rel=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_sums_of_whole_numbers_are_rounded_once(dtype: str) -> None:
    """So they are the same on every host, whatever its CPU, and in whatever order parts are merged."""
    images = some(dtype)
    tally = tallied(said(3, dtype), images)
    for band, found in enumerate(tally.statistics()):
        values = [Fraction(value) for value in column(images, band).tolist()]
        mean = sum(values) / len(values)
        assert found is not None
        assert found.mean == float(mean)
        assert found.std == math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    once = tally.statistics()
    for _ in range(38):  # now squares are beyond 64 bits
        tally.merge(Tally.of_state(tally.pixels, tally.state()))
    for found, expected in zip(tally.statistics(), once, strict=True):
        assert found is not None
        assert expected is not None
        assert (found.mean, found.std) == (expected.mean, expected.std)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_floats_are_as_near_as_is_said(scale: float) -> None:
    images = [(image * np.float32(scale)) for image in some("float32", 40)]
    for band, found in enumerate(tallied(said(3, "float32"), images).statistics()):
        assert found is not None
        expected = of_numpy(column(images, band))
        for name, value in found.model_dump().items():
            precision = 1e-6 if name in ("mean", "std") else 2**-7
            assert value == pytest.approx(expected[name], rel=precision), name


def test_floats_of_one_class_are_told_apart_as_if_they_were_even() -> None:
    """8 to 8.0625 share their upper 16 bits."""
    image = np.linspace(8, 8.0625, 10_000, endpoint=False, dtype=np.float32).reshape(100, 100, 1)
    (found,) = tallied(said(1, "float32"), [image]).statistics()
    assert found is not None
    assert found.p1 == pytest.approx(np.percentile(image, 1), abs=1e-5)
    assert found.p98 == pytest.approx(np.percentile(image, 98), abs=1e-5)


def test_a_mean_far_from_zero_does_not_swallow_the_deviation() -> None:
    images = [image + np.float32(2**20) for image in some("float32", 9)]
    (found, *_) = tallied(said(3, "float32"), images).statistics()
    assert found is not None
    assert found.std == pytest.approx(column(images, 0).std(dtype=float), rel=1e-9)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_parts_in_any_order_make_the_whole(dtype: str) -> None:
    images, pixels = some(dtype, 9), said(3, dtype)
    whole = tallied(pixels, images).statistics()
    parts = [tallied(pixels, images[start::4]) for start in range(4)]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        joined = Tally(pixels)
        for number in order:
            joined.merge(parts[number])
        for found, expected in zip(joined.statistics(), whole, strict=True):
            assert found is not None
            assert expected is not None
            assert found.model_dump() == pytest.approx(expected.model_dump(), rel=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_tally_survives_a_file_without_pickle(dtype: str) -> None:
    pixels, file = said(3, dtype), io.BytesIO()
    tally = tallied(pixels, some(dtype))
    np.savez(file, **tally.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        again = Tally.of_state(pixels, dict(stored))
    assert again.statistics() == tally.statistics()
    again.merge(tally)
    assert again.statistics()[0].mean == pytest.approx(tally.statistics()[0].mean)  # type: ignore[union-attr]


def test_counts_of_other_bands_are_refused() -> None:
    state = tallied(said(3, "uint16"), some("uint16")).state()
    for pixels in (said(2, "uint16"), said(3, "uint8")):
        with pytest.raises(DataError, match="counts of other images"):
            Tally.of_state(pixels, state)
    with pytest.raises(DataError, match="counts of other images"):
        Tally.of_state(said(3, "uint16"), {"classes": state["classes"]})


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 0), ("uint16", 65535), ("int16", -9999), ("float32", -3.4e38)])
def test_missing_pixels_are_left_out(dtype: str, nodata: float) -> None:
    images, rng = some(dtype), np.random.default_rng(2)
    whole = [column(images, band) for band in range(3)]
    holes = []
    for image in images:
        hole = rng.random(image.shape) < 0.3
        image[hole] = nodata
        holes.append(hole)
    if dtype == "float32":
        images[0][0, 0], holes[0][0, 0] = (np.nan, np.inf, -np.inf), True
    kept = [values[~column(holes, band)] for band, values in enumerate(whole)]
    kept = [values[values != nodata] for values in kept]
    for values, found in zip(kept, tallied(said(3, dtype, nodata), images).statistics(), strict=True):
        assert found is not None
        near = 2**-7 if dtype == "float32" else 1e-12
        assert found.model_dump() == pytest.approx(of_numpy(values), rel=near)


def test_a_nodata_that_the_type_cannot_hold_leaves_nothing_out() -> None:
    images = some("uint8")
    plain = tallied(said(3, "uint8"), images).statistics()
    for nodata in (-9999.0, 0.5, 1e20):
        assert tallied(said(3, "uint8", nodata), images).statistics() == plain
        assert present(images[0], nodata).all()


def test_a_band_without_values_has_no_statistics() -> None:
    image = np.zeros((4, 4, 2), np.uint16)
    image[..., 1] = 7
    constant = Statistics(mean=7, std=0, p1=7, p2=7, p98=7, p99=7)
    assert tallied(said(2, "uint16", 0), [image]).statistics() == (None, constant)
    assert Tally(said(1, "float32")).statistics() == (None,)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 2), np.uint16), np.zeros((4, 4, 3), np.int16), np.zeros((4, 3))])
def test_images_of_another_kind_are_refused(image: np.ndarray) -> None:
    with pytest.raises(DataError, match="but the set says 3 bands of uint16"):
        Tally(said(3, "uint16")).add(image)


def test_real_sentinel2_tiles_are_as_numpy_and_torchgeo_have_them() -> None:
    paths = sorted((SHARED / "data/eurosat100/tif").rglob("*.tif"))
    if not paths:
        pytest.skip("no data/eurosat100/tif in $EXPLORA_SHARED")
    images = [tifffile.imread(path) for path in paths]
    pixels = Pixels(bands=sentinel2(EUROSAT), dtype="uint16", unit="dn", scale=1)
    for band, found in enumerate(tallied(pixels, images).statistics()):
        assert found is not None
        assert found.model_dump() == pytest.approx(of_numpy(column(images, band)), rel=1e-12)
        assert found.mean == pytest.approx(PUBLISHED[band], rel=0.06)
