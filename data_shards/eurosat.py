"""EuroSAT, 27,000 Sentinel-2 patches of 64 px in 10 classes: RGB pictures, and tifs of all 13 bands."""

from __future__ import annotations

from pathlib import Path

from data_shards.layout import PHOTOS, TIFFS, ClassFolders
from explora.bands import Pixels, sentinel2
from explora.data.shards.listing import Listing

CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""Bands in the order of the tifs: B8A is the last one, not the ninth as in Sentinel-2's products."""

_RGB = ClassFolders(CLASSES, ("", "2750", "EuroSAT_RGB"), PHOTOS, "eurosat")
_ALL_BANDS = ClassFolders(
    CLASSES,
    ("", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif", "EuroSAT_MS"),
    TIFFS,
    "eurosat",
    Pixels(bands=sentinel2(BANDS), dtype="uint16", unit="reflectance", scale=1e-4),
)


def samples(root: str | Path, split: str | None = None) -> Listing:
    """RGB pictures, `<class>/<class>_<n>.jpg` (or png) in the root or where the official archives put them.

    Splits are lists of file names in the root, `eurosat-{train,val,test}.txt` (Neumann et al., arXiv 1911.06721), or
    folders.

    Raises:
        DataError: the layout is another one, or there is no such split.
    """
    return _RGB.listing(root, split)


def samples13(root: str | Path, split: str | None = None) -> Listing:
    """Tifs of 13 bands of level 1C, uint16, reflectance times 10,000, resampled to 10 m; otherwise as `samples`.

    The lists of the splits name the jpg files; the tifs differ only in the ending.
    """
    return _ALL_BANDS.listing(root, split)
