"""From stored pixels to what views cut: the bands that a backbone takes, as 8-bit levels of its own range."""

from __future__ import annotations

import numpy as np

from explora.bands import Pixels, Scaling
from explora.data.views import Views
from explora.errors import ConfigError, DataError


class Intake:
    """Picks the bands of some views out of stored images and scales them to levels of 0 to 255.

    Raises:
        DataError: the set lacks a band.
        ConfigError: the views' scaling is in another unit, or for other bands, than the set's values.
    """

    def __init__(self, pixels: Pixels, views: Views) -> None:
        absent = [name for name in views.bands if name not in pixels.names]
        if absent:
            raise DataError(f"bands {', '.join(absent)} are not among those of the images: {', '.join(pixels.names)}")
        self._bands = [pixels.names.index(name) for name in views.bands]
        self._as_stored = pixels.dtype == "uint8" and views.scaling in (None, "levels", whole_range(views.bands))
        self._all = self._bands == list(range(len(pixels.names)))
        if self._as_stored:
            return
        if not isinstance(views.scaling, Scaling):
            raise ConfigError(f"views.scaling: {views.scaling} has not been settled for images of {pixels.dtype}")
        if views.scaling.unit != pixels.unit:
            raise ConfigError(
                f"views.scaling: is in {views.scaling.unit}, but the values of the images in {pixels.unit}"
            )
        low, high = (np.asarray(side, np.float32) for side in (views.scaling.low, views.scaling.high))
        self._slope = pixels.scale * 255 / (high - low)
        self._start = (pixels.offset - low) * 255 / (high - low)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Stored (H, W, bands) to levels, uint8 (H, W, bands of the views)."""
        chosen = image if self._all else image[..., self._bands]
        if self._as_stored:
            return chosen
        levels = chosen.astype(np.float32) * self._slope + self._start
        return np.rint(levels).clip(0, 255).astype(np.uint8)


def whole_range(bands: tuple[str, ...]) -> Scaling:
    """All levels of 8-bit images."""
    return Scaling(unit="level", low=(0.0,) * len(bands), high=(1.0,) * len(bands))
