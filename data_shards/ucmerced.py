"""UC Merced Land Use, 2,100 aerial photographs of 256 px in 21 classes."""

from __future__ import annotations

from pathlib import Path

from data_shards.layout import PHOTOS, TIFFS, ClassFolders
from explora.data.shards.listing import Listing

CLASSES = (
    *("agricultural", "airplane", "baseballdiamond", "beach", "buildings", "chaparral", "denseresidential"),
    *("forest", "freeway", "golfcourse", "harbor", "intersection", "mediumresidential", "mobilehomepark"),
    *("overpass", "parkinglot", "river", "runway", "sparseresidential", "storagetanks", "tenniscourt"),
)

_LAYOUT = ClassFolders(CLASSES, ("Images", "UCMerced_LandUse/Images", ""), (*TIFFS, *PHOTOS), "uc_merced")


def samples(root: str | Path, split: str | None = None) -> Listing:
    """`Images/<class>/<class>00.tif` as the official archive has it, or the class folders in the root.

    The official set has no splits. They are lists of file names in the root, `uc_merced-{train,val,test}.txt` (Neumann
    et al., arXiv 1911.06721), or folders, `{train,test}/<class>/<class>00.jpg`.

    Raises:
        DataError: the layout is another one, or there is no such split.
    """
    return _LAYOUT.listing(root, split)
