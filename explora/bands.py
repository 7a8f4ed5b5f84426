"""What the channels of an image mean: band names, stored values, statistics, and the range that a backbone is fed."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from pydantic import Field, model_validator

from explora.config import Config

Unit: TypeAlias = Literal["level", "dn", "reflectance", "decibel"]
"""What values are: display levels in [0, 1], raw counts of a sensor, the share of light that comes back, radar echo."""
RGB: Final = ("B04", "B03", "B02")
"""Red, green, blue: the channels of photographs, and of backbones that were trained on them."""


class Statistics(Config):
    """Of one band's stored values over a whole set, nodata left out."""

    mean: float
    """Mean."""
    std: float = Field(ge=0)
    """Standard deviation."""
    p1: float
    """1st percentile."""
    p2: float
    """2nd percentile."""
    p98: float
    """98th percentile."""
    p99: float
    """99th percentile."""


class Band(Config):
    """One channel as it is stored."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")
    """Canonical name, see `canonical`."""
    gsd: float | None = Field(None, gt=0)
    """Ground sample distance in metres, null where unknown."""
    statistics: Statistics | None = None
    """Null until `explora pack` or `explora stats` has seen all images."""


class Pixels(Config):
    """What the stored values of a set are: value = stored * scale + offset, in `unit`."""

    bands: tuple[Band, ...] = Field(min_length=1)
    """Channels in stored order."""
    dtype: Literal["uint8", "uint16", "int16", "float32"] = "uint8"
    """Type of the stored values."""
    unit: Unit = "level"
    """What values are, once scaled."""
    scale: float = Field(1 / 255, gt=0)
    """Values of one stored step."""
    offset: float = 0.0
    """Value of a stored 0."""
    nodata: float | None = None
    """Stored value that stands for a missing pixel; NaN always does."""

    @model_validator(mode="after")
    def _told_apart(self) -> Pixels:
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(f"band {', '.join(twice)} is named more than once")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of the bands in stored order."""
        return tuple(band.name for band in self.bands)


PHOTOGRAPH: Final = Pixels(bands=tuple(Band(name=name) for name in RGB))
"""Ordinary 8-bit RGB images."""


class Scaling(Config):
    """Which values become 0 and which 1 before a backbone's own mean and std; what is beyond is clipped."""

    unit: Unit
    """Unit of `low` and `high`."""
    low: tuple[float, ...] = Field(min_length=1)
    """Value that becomes 0, one for each band."""
    high: tuple[float, ...] = Field(min_length=1)
    """Value that becomes 1, one for each band."""

    @model_validator(mode="after")
    def _rises(self) -> Scaling:
        if len(self.low) != len(self.high) or any(a >= b for a, b in zip(self.low, self.high, strict=False)):
            raise ValueError(f"low {self.low} and high {self.high}: give both for every band, low below high")
        return self


def canonical(name: str) -> str:
    """The canonical name of a band, B02 style, from any spelling in use; unknown names come back as they are."""
    return _ALIASES.get(name.strip().lower(), name)


_ALIASES = {"red": "B04", "green": "B03", "blue": "B02"}
