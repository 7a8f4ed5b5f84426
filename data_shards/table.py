"""Any list of images, as CSV or Parquet: a path and perhaps one label or several, a mask, a group and a split each."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from data_shards.layout import Samples, checked, chosen, csv_header, csv_rows
from explora.data.shards.adopt import class_names
from explora.data.shards.listing import Listing, RawSample
from explora.data.shards.manifest import Groups
from explora.errors import DataError

COLUMNS = {
    "path": ("path", "image_path", "img_path", "file_path", "filepath", "file", "filename", "file_name", "image"),
    "label": ("label", "class", "category", "class_name", "label_name", "target"),
    "labels": ("labels", "classes", "categories", "class_names", "label_names", "targets"),
    "mask": ("mask", "mask_path", "mask_file"),
    "group": ("group", "region", "domain"),
    "split": ("split", "subset", "partition"),
}
"""Names that a column may have, in any case; where a table has more than one of them, the first one here counts."""
MASKS = "masks.txt"
"""Beside a table with a column of masks: names of the classes in them, one to a line, in the order of their numbers."""
MOST_CLASSES = 100_000
"""More than these are taken for a mistake, such as a column of identifiers."""


def samples(root: str | Path, split: str | None = None) -> Listing:
    """The images of a table `root`, in its order: columns path, label or labels, mask, group and split, all but the
    first optional.

    Paths are relative to the folder of the table, or absolute. Labels that are all whole numbers are taken as they are
    (-1: none); text is numbered by the alphabet over all splits. Empty cells are no label, no group. A cell of the
    column labels holds any number of them with `;` or `|` between, or in Parquet a list. Masks are as `decode_mask`
    reads them; `masks.txt` beside the table names their classes.

    Raises:
        DataError: the file is absent, damaged or empty, lacks the path or the split asked for; it has both label and
            labels, or masks without `masks.txt`; most images are absent.
    """
    table = Path(root)
    if table.is_dir():
        raise DataError(f"{table}: is a folder; give the .csv or .parquet file itself")
    if not table.is_file():
        raise DataError(f"{table}: no such file; expected a .csv or .parquet with the column path, and perhaps label")
    names = _columns(table)
    if split is not None and "split" not in names:
        raise DataError(f"{table}: no column for the split '{split}'; name it {' or '.join(COLUMNS['split'])}")
    several = "labels" in names
    seen: dict[str, dict[str, None]] = {role: {} for role in ("labels" if several else "label", "group", "split")}
    for _, row in _rows(table, names):
        for role, values in seen.items():
            values |= dict.fromkeys(_apart(row.get(role, ""), role))
    labels, groups, splits = ([value for value in values if value] for values in seen.values())
    wanted = None if split is None else chosen(split, sorted(splits), table)[0]
    classes, label_of = _labels(labels, table)
    if several and classes is None:
        raise DataError(f"{table}: its column {names['labels']} names no class")
    masks = _mask_names(table, names["mask"]) if "mask" in names else None
    group_of = {name: number for number, name in enumerate(sorted(groups))}

    def find() -> Iterator[RawSample]:
        for place, row in _rows(table, names):
            if wanted is not None and row["split"] != wanted:
                continue
            path = row["path"]
            if not path:
                raise DataError(f"{table}, {place}: no path")
            label: int | tuple[int, ...] = label_of.get(row.get("label", ""), -1)
            if several:
                label = tuple(sorted({label_of[name] for name in _apart(row["labels"], "labels")} - {-1}))
            mask = table.parent / row["mask"] if row.get("mask") else None
            yield RawSample(table.parent / path, label, group_of.get(row.get("group", ""), -1), path, mask=mask)

    images = checked(Samples(find), table)
    groups_named = Groups(by=names["group"], names=sorted(groups)) if groups else None
    return Listing(classes, images, groups=groups_named, masks=masks)


def _apart(cell: str, role: str) -> list[str]:
    """What a cell says: several labels, or one of anything else."""
    if role != "labels":
        return [cell]
    return [name for name in map(str.strip, re.split(r"[;|]", cell)) if name]


def _mask_names(table: Path, column: str) -> list[str]:
    if not (table.parent / MASKS).is_file():
        raise DataError(
            f"{table}: has a column {column}, but no {MASKS} lies beside it; name the classes in masks there, one to a "
            "line, in the order of their numbers, or rename the column if it holds no masks"
        )
    return class_names(table.parent / MASKS)


def _columns(table: Path) -> dict[str, str]:
    """What the columns that mean something to us are called in this table."""
    there = _header(table)
    found = {}
    for role, spellings in COLUMNS.items():
        fitting = [name for spelling in spellings for name in there if name.lower() == spelling]
        if fitting:
            found[role] = fitting[0]
    if "path" not in found:
        raise DataError(
            f"{table}: no column of paths ({', '.join(COLUMNS['path'])}); columns there: {', '.join(there) or 'none'}"
        )
    if {"label", "labels"} <= set(found):
        raise DataError(
            f"{table}: has both a column {found['label']}, of one label an image, and {found['labels']}, of several; "
            "rename the one that does not count"
        )
    return found


def _labels(said: list[str], table: Path) -> tuple[list[str] | None, dict[str, int]]:
    """Class names, and labels by what the table says."""
    numbers = {value: int(float(value)) for value in said if re.fullmatch(r"-1(\.0+)?|\d{1,9}(\.0+)?", value)}
    numbered = len(numbers) == len(said)
    most = max(numbers.values(), default=-1) + 1 if numbered else len(said)
    if most > MOST_CLASSES:
        raise DataError(
            f"{table}: {most} classes, more than {MOST_CLASSES}; is this column really the label of an image?"
        )
    classes = [str(label) for label in range(most)] if numbered else sorted(said)
    return classes or None, numbers if numbered else {name: label for label, name in enumerate(classes)}


def _header(table: Path) -> list[str]:
    if table.suffix.lower() == ".csv":
        return csv_header(table)
    parquet = _parquet(table)
    try:
        return list(parquet.read_schema(table).names)
    except (OSError, ValueError) as error:
        raise _unreadable(table, error) from None


def _rows(table: Path, names: dict[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Where a row stands, and its cells by what their columns mean; empty text for missing ones."""
    if table.suffix.lower() == ".csv":
        for line, cells in csv_rows(table):
            yield f"line {line}", {role: cells[name] for role, name in names.items()}
        return
    number = 0
    try:
        with _parquet(table).ParquetFile(table) as file:
            for batch in file.iter_batches(columns=sorted(names.values())):
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {role: _text(values[name]) for role, name in names.items()}
    except (OSError, ValueError) as error:
        raise error if isinstance(error, DataError) else _unreadable(table, error) from None


def _text(value: object) -> str:
    if isinstance(value, list):
        return ";".join(map(_text, value))
    missing = value is None or value != value  # NaN differs from itself
    return "" if missing else str(value).strip()


def _parquet(table: Path) -> ModuleType:
    if table.suffix.lower() not in (".parquet", ".pq"):
        raise DataError(f"{table}: expected a file that ends in .csv or .parquet")
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{table}: Parquet needs pyarrow; run `pip install 'explora[parquet]'`") from None


def _unreadable(table: Path, error: Exception) -> DataError:
    return DataError(f"{table}: cannot be read as Parquet: {error}")
