"""NWPU-RESISC45, 31,500 aerial photographs of 256 px in 45 classes."""

from __future__ import annotations

from pathlib import Path

from data_shards.layout import PHOTOS, ClassFolders
from explora.data.shards.listing import Listing

CLASSES = (
    *("airplane", "airport", "baseball_diamond", "basketball_court", "beach", "bridge", "chaparral", "church"),
    *("circular_farmland", "cloud", "commercial_area", "dense_residential", "desert", "forest", "freeway"),
    *("golf_course", "ground_track_field", "harbor", "industrial_area", "intersection", "island", "lake", "meadow"),
    *("medium_residential", "mobile_home_park", "mountain", "overpass", "palace", "parking_lot", "railway"),
    *("railway_station", "rectangular_farmland", "river", "roundabout", "runway", "sea_ice", "ship", "snowberg"),
    *("sparse_residential", "stadium", "storage_tank", "tennis_court", "terrace", "thermal_power_station", "wetland"),
)

_LAYOUT = ClassFolders(CLASSES, ("NWPU-RESISC45", ""), PHOTOS, "resisc45")


def samples(root: str | Path, split: str | None = None) -> Listing:
    """`NWPU-RESISC45/<class>/<class>_001.jpg`, or the class folders in the root.

    Splits are lists of file names in the root, `resisc45-{train,val,test}.txt` (Neumann et al., arXiv 1911.06721), or
    folders.

    Raises:
        DataError: the layout is another one, or there is no such split.
    """
    return _LAYOUT.listing(root, split)
