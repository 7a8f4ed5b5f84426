"""fMoW-Sentinel, Sentinel-2 time series at the places of fMoW: tifs of 13 bands in 62 classes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from data_shards.fmow_rgb import CLASSES, label_of
from data_shards.layout import chosen, csv_header, csv_rows, existing, joined
from explora.bands import SENTINEL2, Pixels, sentinel2
from explora.data.shards.listing import Listing, RawSample
from explora.errors import DataError

COLUMNS = ("category", "location_id", "image_id")
PIXELS = Pixels(bands=sentinel2(SENTINEL2), dtype="uint16", unit="reflectance", scale=1e-4)


def samples(root: str | Path, split: str | None = None) -> Listing:
    """`<split>.csv` with `category, location_id, image_id`, and `<split>/<cat>/<cat>_<loc>/<cat>_<loc>_<img>.tif`.

    The CSVs (`train`, `val`, `test_gt` from purl.stanford.edu/vg497cb6002) lie in the root, the folders beside them or
    in `fmow-sentinel`, as the archive unpacks. Where a CSV has a column `image_path` that leads to a file in one of the
    first 100 rows, that column counts instead, relative to the root.

    The order of the bands is the one of SatMAE's statistics (Cong et al., 2022), B8A between B08 and B09. No file says
    so. What `explora pack` finds does: B10 (cirrus) is by far the darkest band, with a mean of about 15.

    Raises:
        DataError: the layout is another one, there is no such split, or most images are absent.
    """
    expected = "<split>.csv and <split>/<category>/<category>_<location>/<category>_<location>_<image>.tif"
    root = existing(root, expected)
    tables = {path.stem: path for path in sorted(root.glob("*.csv")) if set(COLUMNS) <= set(csv_header(path))}
    if not tables:
        raise DataError(f"{root}: no CSV with the columns {', '.join(COLUMNS)}; expected {expected}")
    return Listing(list(CLASSES), joined([tables[name] for name in chosen(split, tables, root)], _rows), PIXELS)


def _rows(table: Path) -> Iterator[RawSample]:
    root, split = table.parent, table.stem
    home = next((home for home in ("", "fmow-sentinel/") if (root / home / split).is_dir()), "")
    first = [row.get("image_path", "") for _, row in islice(csv_rows(table, COLUMNS), 100)]
    by_column = any(path and (root / path).is_file() for path in first)
    for line, row in csv_rows(table, COLUMNS):
        category, path = row["category"], row.get("image_path", "")
        if not by_column:
            place = f"{category}_{row['location_id']}"
            path = f"{home}{split}/{category}/{place}/{place}_{row['image_id']}.tif"
        yield RawSample(root / path, label_of(category, f"{table}, line {line}"), name=path)
