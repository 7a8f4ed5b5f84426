"""fMoW-RGB (Christie et al., CVPR 2018): places of 62 classes, by official metadata or SatMAE's CSVs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from data_shards.layout import chosen, csv_cells, entries, existing, joined
from explora.data.shards.listing import Listing, RawSample
from explora.errors import DataError

CLASSES = (
    *("airport", "airport_hangar", "airport_terminal", "amusement_park", "aquaculture", "archaeological_site"),
    *("barn", "border_checkpoint", "burial_site", "car_dealership", "construction_site", "crop_field", "dam"),
    *("debris_or_rubble", "educational_institution", "electric_substation", "factory_or_powerplant", "fire_station"),
    *("flooded_road", "fountain", "gas_station", "golf_course", "ground_transportation_station", "helipad"),
    *("hospital", "impoverished_settlement", "interchange", "lake_or_pond", "lighthouse", "military_facility"),
    *("multi-unit_residential", "nuclear_powerplant", "office_building", "oil_or_gas_facility", "park"),
    *("parking_lot_or_garage", "place_of_worship", "police_station", "port", "prison", "race_track"),
    *("railway_bridge", "recreational_facility", "road_bridge", "runway", "shipyard", "shopping_mall"),
    *("single-unit_residential", "smokestack", "solar_farm", "space_facility", "stadium", "storage_tank"),
    *("surface_mine", "swimming_pool", "toll_booth", "tower", "tunnel_opening", "waste_disposal"),
    *("water_treatment_facility", "wind_farm", "zoo"),
)
"""The 62 classes in the order of their labels, which is that of the alphabet."""
NO_CLASS = "false_detection"
"""What boxes around nothing are called."""
CSV_ENDING = "_62classes.csv"

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""

_LABELS = {name: label for label, name in enumerate(CLASSES)}
_CONTEXT = ((0.5, 0.15), (0.4, 0.2), (0.3, 0.3), (0.2, 0.5), (0.1, 1.0), (0.0, 2.0))
"""The least share of its image that a box spans, and the margin that it gets, both sides together, in boxes."""
_SMALLEST = 3
"""Boxes with a shorter side are left out, as the official baseline does."""


def samples(root: str | Path, split: str | None = None) -> Listing:
    """Images of SatMAE's CSVs where any lies in the root, boxes of the official metadata otherwise.

    `{train,val,test}_62classes.csv` (SatMAE, ExPLoRA): label (number or name), path relative to the CSV, timestamp, by
    position and with or without a header. The images are whole: whoever made such a CSV has cut them.

    `{train,val}/<class>/<class>_<loc>/<class>_<loc>_<img>_rgb.{jpg,json}` (official): each box in `bounding_boxes`
    of the JSON that is of one of the 62 classes is a sample; `_msrgb` files, `false_detection` and boxes under 3 px
    are left out. A box is cut with context as the official baseline does it (github.com/fMoW/baseline): the smaller it
    is in its image, the more of what surrounds it, from 0.15 boxes (half of that on each side) where it spans half of
    the image to 2 boxes where it spans less than a tenth. As there, a box's width is compared with the image's height,
    and its height with the image's width.

    Raises:
        DataError: the layout is another one, there is no such split, or most images or metadata are absent or damaged.
            A few that are become faulty samples.
    """
    expected = f"<split>{CSV_ENDING} or <split>/<class>/<class>_<location>/<class>_<location>_<image>_rgb.jpg"
    root = existing(root, expected)
    tables = {path.name.removesuffix(CSV_ENDING): path for path in sorted(root.glob(f"*{CSV_ENDING}"))}
    if tables:
        return Listing(list(CLASSES), joined([tables[name] for name in chosen(split, tables, root)], _rows))
    divided = [name for name in entries(root)[1] if {*CLASSES, NO_CLASS} & set(entries(root / name)[1])]
    if not divided:
        raise DataError(f"{root}: neither layout of fMoW-RGB; expected {expected}")
    return Listing(list(CLASSES), joined([root / name for name in chosen(split, divided, root)], _boxes))


def label_of(category: str, where: str) -> int:
    """The label of a class by name.

    Raises:
        DataError: there is no such class.
    """
    if category not in _LABELS:
        raise DataError(f"{where}: '{category}' is none of the 62 classes of fMoW")
    return _LABELS[category]


def _rows(table: Path) -> Iterator[RawSample]:
    for row, (line, cells) in enumerate(csv_cells(table)):
        where = f"{table}, line {line}"
        if len(cells) < 2:
            raise DataError(f"{where}: expected label, image path, timestamp")
        said, path = cells[0].strip(), cells[1].strip()
        if said.isdecimal():
            said = CLASSES[int(said)] if int(said) < len(CLASSES) else said
        if row or said in _LABELS:  # the first row may be a header
            yield RawSample(table.parent / path, label_of(said, where), name=path)


def _boxes(split: Path) -> Iterator[RawSample]:
    for category in entries(split)[1]:
        for place in entries(split / category)[1]:
            folder = split / category / place
            files = [name for name in entries(folder)[0] if name.endswith(("_rgb.jpg", "_rgb.json"))]
            for stem in sorted({Path(name).stem for name in files}):
                image, name = folder / f"{stem}.jpg", f"{split.name}/{category}/{place}/{stem}.jpg"
                try:
                    boxes, many = _metadata(folder / f"{stem}.json")
                except DataError as error:
                    yield RawSample(image, name=name, fault=str(error))
                    continue
                for number, (label, box) in boxes.items():
                    yield RawSample(image, label, name=name + (f"#{number}" if many else ""), box=box)


def _metadata(path: Path) -> tuple[dict[int, tuple[int, Box]], bool]:
    """Label and part to cut out of each usable box by its number, and whether there are more boxes than one.

    Raises:
        DataError: the file is absent or damaged, or names another class.
    """
    try:
        content = json.loads(path.read_bytes())
        boxes: Any = content["bounding_boxes"]
        boxes = boxes if isinstance(boxes, list) else [boxes]
        width, height = int(content["img_width"]), int(content["img_height"])
        if min(width, height) < 1:
            raise ValueError(f"an image of {width} x {height} pixels")
        read = [(box["category"], *map(int, box["box"])) for box in boxes]
        cut = {
            number: (label_of(category, path.name), _with_context((x, y, w, h), width, height))
            for number, (category, x, y, w, h) in enumerate(read)
            if category != NO_CLASS and min(w, h) >= _SMALLEST
        }
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path.name}: no readable metadata of fMoW: {error!r}; fetch it again") from None
    return cut, len(boxes) > 1


def _with_context(box: Box, image_width: int, image_height: int) -> Box:
    """A box and its margins, cut at the borders of the image."""
    x, y, width, height = box
    aside, above = _margin(width, width / image_height), _margin(height, height / image_width)
    left, top = max(x - aside, 0), max(y - above, 0)
    right, bottom = min(x + width + aside, image_width), min(y + height + above, image_height)
    return left, top, right - left, bottom - top


def _margin(side: int, share: float) -> int:
    """Pixels on each side of a box whose side is this share of the image's."""
    return int(side * next(context for least, context in _CONTEXT if share >= least) / 2)
