"""WILDS-FMoW (Koh et al., ICML 2021): fMoW at 224 px, divided by year, with regions to be worst in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_shards.fmow_rgb import CLASSES, label_of
from data_shards.layout import Samples, checked, chosen, csv_rows, existing
from explora.data.shards.listing import Listing, RawSample
from explora.data.shards.manifest import Groups
from explora.errors import DataError

IMAGES, COUNTRIES = "rgb_metadata.csv", "country_code_mapping.csv"
SPLITS = {
    ("train", "before 2013"): "train",
    ("val", "before 2013"): "id_val",
    ("test", "before 2013"): "id_test",
    ("val", "2013 to 2015"): "val",
    ("test", "from 2016"): "test",
}
"""fMoW's own split and the time of an image to the split of WILDS; what is not here is in none."""
OTHER = "Other"


def samples(root: str | Path, split: str | None = None) -> Listing:
    """`images/rgb_img_<row>.png` for the rows of `rgb_metadata.csv`, counted from 0; regions of the world are groups.

    The splits are those of WILDS 1.1 with its official scheme, from the column `split` and the year of `timestamp`:
    `train`, `id_val` and `id_test` are fMoW's train, val and test images from before 2013, `val` (out of distribution)
    its val images of 2013 to 2015, `test` its test images from 2016 on. All other rows, such as train images from 2013
    on and the sequestered ones (`seq`), are in no split and left out; without a split, all five are listed.

    A country's region is that of `country_code_mapping.csv` (columns `alpha-3`, `region`). Countries without one are in
    the group `Other`, which WILDS does not count when it looks for the worst region. Years are not kept.

    Raises:
        DataError: the layout is another one, there is no such split, or most images are absent.
    """
    root = existing(root, f"{IMAGES}, {COUNTRIES} and images/rgb_img_<row>.png")
    for name in (IMAGES, COUNTRIES):
        if not (root / name).is_file():
            raise DataError(f"{root}: no {name}; expected it there (in WILDS' own folder, such as fmow_v1.1)")
    splits = set(chosen(split, SPLITS.values(), root))
    countries = csv_rows(root / COUNTRIES, ("alpha-3", "region"))
    region_of = {row["alpha-3"]: row["region"] or OTHER for _, row in countries}
    regions = [*sorted({*region_of.values()} - {OTHER}), OTHER]
    group_of = {country: regions.index(region) for country, region in region_of.items()}
    images = checked(Samples(lambda: _rows(root, splits, group_of, regions.index(OTHER))), root / IMAGES)
    return Listing(list(CLASSES), images, groups=Groups(by="region", names=regions))


def _rows(root: Path, splits: set[str], group_of: dict[str, int], other: int) -> Iterator[RawSample]:
    rows = csv_rows(root / IMAGES, ("split", "category", "country_code", "timestamp"))
    for number, (line, row) in enumerate(rows):
        where = f"{root / IMAGES}, line {line}"
        if SPLITS.get((row["split"], _time(row["timestamp"], where))) in splits:
            name = f"images/rgb_img_{number}.png"
            label = label_of(row["category"], where)
            yield RawSample(root / name, label, group_of.get(row["country_code"], other), name)


def _time(timestamp: str, where: str) -> str:
    """When an image was taken, as WILDS divides time; timestamps are in UTC and begin with the year."""
    if not timestamp[:4].isdecimal():
        raise DataError(f"{where}: timestamp '{timestamp}' does not begin with a year")
    year = int(timestamp[:4])
    return "before 2013" if year < 2013 else "2013 to 2015" if year < 2016 else "from 2016"
