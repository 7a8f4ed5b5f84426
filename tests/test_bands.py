"""Band names in every spelling, what Sentinel-2 sees, and what may not be said of pixels."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from explora.bands import PHOTOGRAPH, RGB, SENTINEL2, Band, Pixels, Scaling, canonical, sentinel2
from explora.config import validate
from explora.errors import ConfigError, DataError

ORDER = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
SPELLINGS = {
    "torchgeo's weights": ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8a", "B9", "B10", "B11", "B12"],
    "STAC 2.0": [
        *("coastal", "blue", "green", "red", "rededge071", "rededge075", "rededge078"),
        *("nir", "nir08", "nir09", "cirrus", "swir16", "swir22"),
    ],
    "STAC 1 and Clay": [
        *("coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3"),
        *("nir", "nir08", "nir09", "cirrus", "swir16", "swir22"),
    ],
    "torchgeo-bench": [
        *("coastal_aerosol", "blue", "green", "red", "red_edge_1", "red_edge_2", "red_edge_3"),
        *("nir", "red_edge_4", "water_vapour", "swir_cirrus", "swir_1", "swir_2"),
    ],
    "GEO-Bench": [
        *("01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05 - Vegetation Red Edge"),
        *("06 - Vegetation Red Edge", "07 - Vegetation Red Edge", "08 - NIR", "08A - Vegetation Red Edge"),
        *("09 - Water vapour", "10 - SWIR - Cirrus", "11 - SWIR", "12 - SWIR"),
    ],
}


@pytest.mark.parametrize("names", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_in_use_leads_to_the_same_names(names: list[str]) -> None:
    assert [canonical(name) for name in names] == ORDER
    assert [canonical(f" {name.upper()} ") for name in names] == ORDER
    assert [canonical(name) for name in ORDER] == ORDER


def test_radar_has_its_names() -> None:
    assert [canonical(name) for name in ("vv", "VH")] == ["VV", "VH"]


@pytest.mark.parametrize("name", ["Vegetation Red Edge", "rededge", "SWIR", "B13", "B00", "B1A", "2", "haze", "B8_A"])
def test_a_name_of_no_band_or_of_several_stays_as_it_is(name: str) -> None:
    assert canonical(name) == name


def test_sentinel2_knows_its_bands_in_order() -> None:
    assert list(SENTINEL2) == ORDER
    assert {name for name, band in SENTINEL2.items() if band.resolution == 10} == {"B02", "B03", "B04", "B08"}
    assert {name for name, band in SENTINEL2.items() if band.resolution == 60} == {"B01", "B09", "B10"}
    waves = [band.wavelength for band in SENTINEL2.values()]
    assert waves == sorted(waves)
    assert (waves[0], waves[-1]) == (0.443, 2.19)


def test_sentinel2_makes_bands_in_the_order_asked_for() -> None:
    assert [band.name for band in sentinel2()] == ORDER
    assert sentinel2(("swir16", "B2")) == (Band(name="B11", gsd=20), Band(name="B02", gsd=10))
    with pytest.raises(DataError, match="VV: no band of Sentinel-2; its bands are B01, B02"):
        sentinel2(("B02", "VV"))


def test_a_band_is_stored_by_its_canonical_name() -> None:
    assert Band(name="08A - Vegetation Red Edge").name == "B8A"
    assert Band(name="haze").name == "haze"
    with pytest.raises(ValidationError):
        Band(name="Vegetation Red Edge")
    with pytest.raises(ValidationError, match="band B02 is named more than once"):
        Pixels(bands=(Band(name="blue"), Band(name="B2")))


def test_photographs_are_red_green_blue_levels() -> None:
    assert PHOTOGRAPH.names == RGB == ("B04", "B03", "B02")
    assert PHOTOGRAPH.scale * 255 == 1


@pytest.mark.parametrize(("low", "high"), [((0.0,), (0.0,)), ((0.0, 0.0), (1.0,)), ((0.0, 2.0), (1.0, 1.0))])
def test_a_scaling_rises_in_every_band(low: tuple[float, ...], high: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="low below high"):
        Scaling(unit="dn", low=low, high=high)


def test_a_scale_that_nobody_gave_is_no_guess() -> None:
    assert validate(Pixels, {"bands": ["red"]}).scale == 1 / 255
    assert validate(Pixels, {"bands": ["red"], "dtype": "uint16", "unit": "dn"}).scale == 1
    assert validate(Pixels, {"bands": ["VV"], "dtype": "float32", "unit": "decibel"}).scale == 1
    for unit in ("reflectance", "level"):
        with pytest.raises(ConfigError, match="scale is needed"):
            validate(Pixels, {"bands": ["red"], "dtype": "uint16", "unit": unit})
    with pytest.raises(ConfigError, match=r"levels are in \[0, 1\].*set scale to 1.52"):
        validate(Pixels, {"bands": ["red"], "dtype": "uint16", "unit": "level", "scale": 1})
