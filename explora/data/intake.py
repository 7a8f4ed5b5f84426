"""From stored pixels to what views cut: the bands that a backbone takes, as 8-bit levels of its own range."""

from __future__ import annotations

from typing import Final

import numpy as np

from explora.bands import PHOTOGRAPH, Pixels, Scaling, Statistics
from explora.data.shards.index import ShardSet
from explora.data.statistics import present
from explora.data.views import Rule, Views
from explora.errors import ConfigError, DataError

OUTSIDE: Final = 1 / 3
"""Share of a band's observed values outside its 1st to 99th percentile that cannot be chance: 2 % are expected."""
CLIPPED: Final = 1 / 2
"""Share of a band's observed values that may be clipped."""
_LEVELS: Final = 4
"""Of 255: with fewer between its percentiles a band shows nothing."""
_SIDE: Final = 256
# Percentiles of float32 are no nearer than this, see `Tally`.
_NEAR: Final = 2**-7


class Intake:
    """Picks the bands of some views out of stored images and scales them to levels of 0 to 255.

    Missing pixels, nodata or NaN, become the level of the views' mean, so they are about zero once normalised.

    Raises:
        DataError: the set lacks a band.
        ConfigError: the views' scaling is in another unit, or for other bands, than the set's values, or is a rule
            that has not been settled, see `settle`.
    """

    def __init__(self, pixels: Pixels, views: Views) -> None:
        self._bands = _places(pixels, views.bands)
        self._all = self._bands == list(range(len(pixels.names)))
        self._nodata, self._may_lack = pixels.nodata, pixels.nodata is not None or pixels.dtype == "float32"
        scaling, levels = views.scaling, whole_range(views.bands, pixels)
        if pixels.dtype == "uint8" and scaling in (None, "levels"):
            scaling = levels
        if not isinstance(scaling, Scaling):
            raise ConfigError(f"views.scaling: {scaling} has not been settled for images of {pixels.dtype}")
        _check_fits(scaling, pixels, views.bands, "views.scaling:")
        if self._may_lack and len(views.mean) != len(views.bands):
            raise ConfigError(f"views.mean: {len(views.mean)} numbers for {len(views.bands)} bands; give one for each")
        self._as_stored = not self._may_lack and scaling == levels
        low, high = np.asarray(scaling.low), np.asarray(scaling.high)
        slope, start = pixels.scale * 255 / (high - low), (pixels.offset - low) * 255 / (high - low)
        missing = np.asarray(views.mean) * 255 if self._may_lack else start
        # Half a level more, because the cast to uint8 cuts.
        self._lines = np.stack([slope, start + 0.5, missing + 0.5]).astype(np.float32)
        self._rows = self._lines

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Stored (H, W, bands) to levels, uint8 (H, W, bands of the views)."""
        chosen = image if self._all else image[..., self._bands]
        if self._as_stored:
            return chosen
        height, width, bands = chosen.shape
        if self._rows.shape[1] != width * bands:
            # Whole rows at a time take half as long as the few bands of one pixel at a time.
            self._rows = np.tile(self._lines, width)
        slope, start, missing = self._rows
        stored = chosen.reshape(height, width * bands)
        levels = stored.astype(np.float32)
        # What stands for missing pixels may be as large as a float32 can be.
        with np.errstate(over="ignore", invalid="ignore"):
            levels *= slope
            levels += start
        np.clip(levels, 0, 255, out=levels)
        if self._may_lack:
            np.copyto(levels, missing, where=~present(stored, self._nodata))
        return levels.astype(np.uint8).reshape(chosen.shape)


def whole_range(bands: tuple[str, ...], pixels: Pixels = PHOTOGRAPH) -> Scaling:
    """All levels of 8-bit images, in the unit of their values."""
    low, high = (stored * pixels.scale + pixels.offset for stored in (0, 255))
    return Scaling(unit=pixels.unit, low=(low,) * len(bands), high=(high,) * len(bands))


def settle(views: Views, pixels: Pixels, recorded: Scaling | None = None) -> Views:
    """The same views with `scaling` in numbers.

    What the config says comes first. Left out, it is what the backbone was trained with; else levels as they are for
    8-bit images; else `sigma`, mean +- 2 std, as SatMAE has it (Cong et al. 2022, section 4).

    Args:
        pixels: the set that statistics are taken from.
        recorded: the scaling that the backbone was trained with, for the bands of the views.

    Raises:
        DataError: the set lacks a band, or statistics that are needed.
        ConfigError: a rule that makes no sense for these images, or numbers in another unit than theirs.
    """
    _places(pixels, views.bands)
    scaling, what = views.scaling, "views.scaling:"
    if scaling is None and recorded is not None:
        scaling, what = recorded, "the backbone was trained with a scaling that"
    if scaling is None:
        scaling = "levels" if pixels.dtype == "uint8" else "sigma"
    if isinstance(scaling, Scaling):
        _check_fits(scaling, pixels, views.bands, what)
    else:
        scaling = _in_numbers(scaling, pixels, views.bands)
    return views.model_copy(update={"scaling": scaling})


def normalisation(pixels: Pixels, scaling: Scaling, bands: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation of some bands of a set, once scaled: 0 is `scaling.low`, 1 is `scaling.high`.

    From the statistics of all values, those that `scaling` clips included.

    Raises:
        DataError: the set lacks a band, or its statistics.
        ConfigError: the scaling is in another unit than the set's values, or for other bands.
    """
    _check_fits(scaling, pixels, bands, "views.scaling:")
    found = _statistics(pixels, bands)
    low, high = np.asarray(scaling.low), np.asarray(scaling.high)
    means = (np.array([one.mean for one in found]) * pixels.scale + pixels.offset - low) / (high - low)
    stds = np.array([_spread(one) for one in found]) * pixels.scale / (high - low)
    return tuple(means.tolist()), tuple(stds.tolist())


def refuse_strange(shards: ShardSet, views: Views, count: int = 64) -> None:
    """Look at some images, spread over the set, before anything is trained on them.

    Args:
        views: with a scaling in numbers, see `settle`.
        count: images to read. Those that cannot be read are passed over.

    Raises:
        DataError: more than a third of the values of a band are outside of its declared 1st to 99th percentile, or
            the scaling clips more than half of them, or leaves next to nothing of any band's differences.
    """
    pixels, looked_at = shards.pixels, min(count, len(shards))
    _refuse_too_wide(shards, views)
    bounds = np.array([_known(pixels), _scaled(pixels, views)]).transpose(0, 2, 1)
    seen, (strange, clipped) = _beyond(shards, bounds, looked_at)
    for band, stored in enumerate(pixels.bands):
        where, number = f"{shards.folder}: band {stored.name}", max(seen[band], 1)
        if strange[band] > OUTSIDE * number:
            assert stored.statistics is not None
            raise DataError(
                f"{where}: {strange[band] / number:.0%} of the values in {looked_at} images are outside of "
                f"{stored.statistics.p1:g} to {stored.statistics.p99:g}, where its statistics have 98 % of them; the "
                "images are of another scale or have changed. If they are right, run `explora stats` on the folder; if "
                "the scale or offset in its manifest is wrong, pack (or index) it again with --pixels"
            )
        if clipped[band] > CLIPPED * number:
            assert isinstance(views.scaling, Scaling)
            place = views.bands.index(stored.name)
            raise DataError(
                f"{where}: views.scaling clips {clipped[band] / number:.0%} of the values in {looked_at} images to 0 "
                f"or 1, as they are not in {views.scaling.low[place]:g} to {views.scaling.high[place]:g} "
                f"{pixels.unit}; is that the scale of these images? Else run `explora stats` on the folder and set "
                "views.scaling to sigma or percentiles"
            )


def _refuse_too_wide(shards: ShardSet, views: Views) -> None:
    """Refuse a range in which every band is all but constant: nobody would see it in a loss."""
    pixels, scaling = shards.pixels, views.scaling
    if not isinstance(scaling, Scaling) or scaling == whole_range(views.bands, pixels):
        return
    stored = [pixels.bands[place].statistics for place in _places(pixels, views.bands)]
    spans = [(one.p98 - one.p2) * pixels.scale for one in stored if one is not None]
    widest = max((span / (b - a) for span, a, b in zip(spans, scaling.low, scaling.high, strict=False)), default=1.0)
    if len(spans) == len(stored) and 0 < widest * 255 < _LEVELS:
        raise DataError(
            f"{shards.folder}: views.scaling leaves at most {widest * 255:.2g} of 255 levels between the 2nd and "
            f"the 98th percentile of any band; is it in {pixels.unit}? Set it to sigma, percentiles or other numbers"
        )


def _places(pixels: Pixels, bands: tuple[str, ...]) -> list[int]:
    """Where in a stored pixel some bands are."""
    absent = [name for name in bands if name not in pixels.names]
    if absent:
        raise DataError(f"bands {', '.join(absent)} are not among those of the images: {', '.join(pixels.names)}")
    return [pixels.names.index(name) for name in bands]


def _check_fits(scaling: Scaling, pixels: Pixels, bands: tuple[str, ...], what: str) -> None:
    if scaling.unit != pixels.unit:
        raise ConfigError(
            f"{what} is in {scaling.unit}, but the images hold values in {pixels.unit}; give views.scaling as sigma, "
            f"percentiles or numbers in {pixels.unit}, or pack the images with the scale and offset of {scaling.unit}"
        )
    if len(scaling.low) != len(bands):
        raise ConfigError(f"{what} has numbers for {len(scaling.low)} bands, but there are {len(bands)}; give as many")


def _in_numbers(rule: Rule, pixels: Pixels, bands: tuple[str, ...]) -> Scaling:
    if rule == "levels":
        if pixels.dtype != "uint8":
            raise ConfigError(
                f"views.scaling: levels takes 8-bit images as they are, but these are {pixels.dtype}; use sigma, "
                "percentiles or numbers"
            )
        return whole_range(bands, pixels)
    low, high = [], []
    for one in _statistics(pixels, bands):
        below, above = (one.p2, one.p98) if rule == "percentiles" else _sigma(one)
        if not below < above:
            below, above = below - 0.5, below + 0.5
        low.append(below * pixels.scale + pixels.offset)
        high.append(above * pixels.scale + pixels.offset)
    return Scaling(unit=pixels.unit, low=tuple(low), high=tuple(high))


def _sigma(one: Statistics) -> tuple[float, float]:
    return one.mean - 2 * _spread(one), one.mean + 2 * _spread(one)


def _spread(one: Statistics) -> float:
    """Standard deviation of stored values; of a band that is the same everywhere, one for which 4 make one step."""
    return one.std or 0.25


def _statistics(pixels: Pixels, bands: tuple[str, ...]) -> list[Statistics]:
    by_name = {band.name: band.statistics for band in pixels.bands}
    found = [by_name[pixels.names[place]] for place in _places(pixels, bands)]
    unknown = [name for name, one in zip(bands, found, strict=True) if one is None]
    if unknown:
        raise DataError(
            f"no statistics of bands {', '.join(unknown)}; run `explora stats FOLDER` on the packed images, or give "
            "views.scaling, mean and std as numbers, or leave out bands without any value"
        )
    return [one for one in found if one is not None]


def _known(pixels: Pixels) -> list[tuple[float, float]]:
    """Stored values that bound 98 % of each stored band."""
    bounds = []
    for band in pixels.bands:
        low, high = (-np.inf, np.inf) if band.statistics is None else (band.statistics.p1, band.statistics.p99)
        near = _NEAR if pixels.dtype == "float32" and band.statistics is not None else 0.0
        bounds.append((low - near * abs(low), high + near * abs(high)) if near else (low, high))
    return bounds


def _scaled(pixels: Pixels, views: Views) -> list[tuple[float, float]]:
    """Stored values that become no less than level 0 and no more than 255, of each stored band."""
    bounds = [(-np.inf, np.inf)] * len(pixels.bands)
    if isinstance(views.scaling, Scaling):
        _check_fits(views.scaling, pixels, views.bands, "views.scaling:")
        for place, *ends in zip(_places(pixels, views.bands), views.scaling.low, views.scaling.high, strict=True):
            low, high = ((end - pixels.offset) / pixels.scale for end in ends)
            # What rounds to a level is not clipped.
            bounds[place] = (low - (high - low) / 510, high + (high - low) / 510)
    return bounds


def _beyond(shards: ShardSet, bounds: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Values seen of each band (bands,), and how many were beyond each pair of bounds (pairs, bands).

    Args:
        bounds: pairs of low and high, (pairs, 2, bands).
    """
    pixels = shards.pixels
    seen = np.zeros(len(pixels.bands), np.int64)
    beyond = np.zeros((len(bounds), len(seen)), np.int64)
    # One out of each stretch, by lot: sets may be in an order that repeats.
    edges = np.linspace(0, len(shards), count + 1).astype(np.int64)
    for index in np.random.default_rng(0).integers(edges[:-1], edges[1:]):
        try:
            image = shards.image(int(index))
        except DataError:
            continue
        every = max(1, min(image.shape[:2]) // _SIDE)
        values = image[::every, ::every]
        there = present(values, pixels.nodata)
        seen += there.sum((0, 1))
        for number, (low, high) in enumerate(bounds):
            beyond[number] += (((values < low) | (values > high)) & there).sum((0, 1))
    return seen, beyond
