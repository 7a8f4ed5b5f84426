"""What the channels of an image mean: band names, stored values, statistics, and the range that a backbone is fed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from pydantic import Field, field_validator, model_validator

from explora.config import Config
from explora.errors import DataError

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

    @field_validator("name", mode="before")
    @classmethod
    def _canonical(cls, name: Any) -> Any:
        return canonical(name) if isinstance(name, str) else name


class Pixels(Config):
    """What the stored values of a set are: value = stored * scale + offset, in `unit`."""

    bands: tuple[Band, ...] = Field(min_length=1)
    """Channels in stored order."""
    dtype: Literal["uint8", "uint16", "int16", "float32"] = "uint8"
    """Type of the stored values."""
    unit: Unit = "level"
    """What values are, once scaled."""
    scale: float = Field(1 / 255, gt=0)
    """Value of one stored step; left out: 1/255 for 8-bit levels, 1 for dn and floats, else it is needed."""
    offset: float = 0.0
    """Value of a stored 0."""
    nodata: float | None = None
    """Stored value that stands for a missing pixel; NaN always does."""

    @field_validator("bands", mode="before")
    @classmethod
    def _by_name(cls, bands: Any) -> Any:
        """A name alone is a band, too."""
        return (
            [{"name": band} if isinstance(band, str) else band for band in bands] if isinstance(bands, list) else bands
        )

    @model_validator(mode="before")
    @classmethod
    def _usual_scale(cls, given: Any) -> Any:
        """A scale is never guessed where guessing it wrong would show nowhere."""
        if not isinstance(given, Mapping) or "scale" in given:
            return given
        dtype, unit = given.get("dtype", "uint8"), given.get("unit", "level")
        if (dtype, unit) == ("uint8", "level"):
            return given
        if dtype == "float32" or unit == "dn":
            return {**given, "scale": 1.0}
        example = f"scale: {1 / 65535:.6g}" if unit == "level" else "scale: 0.0001"
        raise ValueError(f"scale is needed: how much {unit} is one step of {dtype}? such as `{example}`, or `unit: dn`")

    @model_validator(mode="after")
    def _levels_end_at_one(self) -> Pixels:
        most = {"uint8": 255, "int16": 32767, "uint16": 65535}.get(self.dtype)
        if self.unit == "level" and most is not None and most * self.scale + self.offset > 1.01:
            raise ValueError(
                f"levels are in [0, 1], but {most} times scale plus offset is {most * self.scale + self.offset:.4g}; "
                f"set scale to {1 / most:.6g}, or unit to dn or reflectance"
            )
        return self

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


class Sensed(NamedTuple):
    """What one band of a sensor sees."""

    wavelength: float
    """Centre, micrometres."""
    resolution: float
    """Ground resolution that the sensor delivers, metres; files are often resampled to the finest band."""


SENTINEL2: Final[Mapping[str, Sensed]] = MappingProxyType(
    {
        "B01": Sensed(0.443, 60),
        "B02": Sensed(0.490, 10),
        "B03": Sensed(0.560, 10),
        "B04": Sensed(0.665, 10),
        "B05": Sensed(0.705, 20),
        "B06": Sensed(0.740, 20),
        "B07": Sensed(0.783, 20),
        "B08": Sensed(0.842, 10),
        "B8A": Sensed(0.865, 20),
        "B09": Sensed(0.945, 60),
        "B10": Sensed(1.375, 60),
        "B11": Sensed(1.610, 20),
        "B12": Sensed(2.190, 20),
    }
)
"""The bands of Sentinel-2 MSI in the order of ESA's products, by canonical name (Sentinel-2 User Handbook, MSI)."""

# Beside B1, B01 and the like: eo common names of STAC (1.x and 2.0), Clay, torchgeo-bench, GEO-Bench. A name that more
# than one band goes by (GEO-Bench's "Vegetation Red Edge" without its number, eo's "rededge" and "swir") is not here.
_COMMON: Final = {
    "B01": ("coastal", "coastal aerosol", "01 coastal aerosol"),
    "B02": ("blue", "02 blue"),
    "B03": ("green", "03 green"),
    "B04": ("red", "04 red"),
    "B05": ("rededge071", "rededge1", "red edge 1", "05 vegetation red edge"),
    "B06": ("rededge075", "rededge2", "red edge 2", "06 vegetation red edge"),
    "B07": ("rededge078", "rededge3", "red edge 3", "07 vegetation red edge"),
    "B08": ("nir", "08 nir"),
    "B8A": ("nir08", "narrow nir", "nir narrow", "rededge4", "red edge 4", "08a vegetation red edge"),
    "B09": ("nir09", "water vapour", "water vapor", "09 water vapour"),
    "B10": ("cirrus", "swir cirrus", "10 swir cirrus"),
    "B11": ("swir16", "swir1", "swir 1", "11 swir"),
    "B12": ("swir22", "swir2", "swir 2", "12 swir"),
    "VV": ("vv",),
    "VH": ("vh",),
}
_ALIASES: Final = {alias: name for name, aliases in _COMMON.items() for alias in aliases}
_NUMBERED: Final = re.compile(r"b0?([1-9]|1[0-2]|8a)")


def canonical(name: str) -> str:
    """The canonical name of a band, B02 style, from any spelling in use; unknown names come back as they are.

    Numbers are those of Sentinel-2; bands of other sensors need names of their own. Case, and whether words are parted
    by blanks, underscores or dashes, do not count.
    """
    spelled = re.sub(r"[\s_-]+", " ", name).strip().lower()
    numbered = _NUMBERED.fullmatch(spelled)
    if numbered:
        return "B" + numbered[1].upper().zfill(2)
    return _ALIASES.get(spelled, name)


def sentinel2(names: Iterable[str] = tuple(SENTINEL2)) -> tuple[Band, ...]:
    """Bands of Sentinel-2 by any name in use, in the order given, each with the resolution that the sensor delivers.

    Raises:
        DataError: a name is none of a band of Sentinel-2.
    """
    chosen = tuple(map(canonical, names))
    strange = [name for name in chosen if name not in SENTINEL2]
    if strange:
        raise DataError(f"{', '.join(strange)}: no band of Sentinel-2; its bands are {', '.join(SENTINEL2)}")
    return tuple(Band(name=name, gsd=SENTINEL2[name].resolution) for name in chosen)


PHOTOGRAPH: Final = Pixels(bands=tuple(Band(name=name) for name in RGB))
"""Ordinary 8-bit RGB images."""
