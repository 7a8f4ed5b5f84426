"""What the layouts of data sets have in common: files that must be there, splits, CSV files, class folders."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath

from explora.bands import PHOTOGRAPH, Pixels
from explora.data.shards.listing import Listing, RawSample
from explora.errors import DataError

PHOTOS = (".jpg", ".jpeg", ".png")
"""Endings of 8-bit pictures."""
TIFFS = (".tif", ".tiff")
"""Endings of images of any bands."""
LOOKED_AT = 1_000
"""So many images are looked at before packing; of a list of millions that would take as long as packing it."""


class Samples(Iterable[RawSample]):
    """Images that are found anew each time somebody goes through them, so that millions need no memory."""

    def __init__(self, find: Callable[[], Iterator[RawSample]]) -> None:
        self._find = find

    def __iter__(self) -> Iterator[RawSample]:
        return self._find()


def checked(samples: Samples, source: Path) -> Samples:
    """The same images, once the first 1,000 were looked at: a few that are absent are left to the packer, which leaves
    them out and says so, but where most are, the root or the paths are wrong.

    Raises:
        DataError: there are no images, more than half of them are absent or faulty, or whatever finding them raises;
            what is wrong further on is raised as the images are gone through.
    """
    count, absent, first = 0, 0, ""
    for count, sample in enumerate(samples, 1):
        fault = sample.fault or ("" if os.path.isfile(sample.path) else "absent")
        if fault:
            absent, first = absent + 1, first or f"{sample.path} ({fault})"
        if count >= LOOKED_AT and absent <= count / 2:
            return samples
    if not count:
        raise DataError(f"{source}: no images in it")
    _refuse_if_most(absent, count, first, source)
    return samples


def _refuse_if_most(absent: int, count: int, first: str, source: Path) -> None:
    if absent > count / 2:
        raise DataError(f"{source}: {absent} of {count} images are not where they should be; the first is {first}")


def joined(parts: Sequence[Path], find: Callable[[Path], Iterator[RawSample]]) -> Samples:
    """The images that `find` finds in one list or folder after the other, each `checked`.

    Raises:
        DataError: a part has no images, most of its files are absent, or whatever finding them raises.
    """
    for part in parts:
        checked(Samples(partial(find, part)), part)
    return Samples(lambda: chain.from_iterable(map(find, parts)))


def existing(root: str | Path, expected: str) -> Path:
    """The root of a data set as a path.

    Raises:
        DataError: it is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected {expected} in it")
    return root


def chosen(split: str | None, splits: Collection[str], where: Path) -> list[str]:
    """The split asked for, or all of them.

    Raises:
        DataError: there is no such split.
    """
    if split is not None and split not in splits:
        raise DataError(f"{where}: no split '{split}'; splits there: {', '.join(splits) or 'none'}")
    return list(splits) if split is None else [split]


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in a folder, each sorted, without hidden ones.

    Raises:
        DataError: it cannot be read.
    """
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if not entry.name.startswith((".", "__MACOSX")):
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted(files), sorted(folders)


def csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each row of a CSV file in UTF-8; blank lines and a byte order mark are passed over.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8: {error}") from None


def csv_header(path: Path) -> list[str]:
    """Names of the columns of a CSV file, none for an empty one."""
    _, names = next(csv_cells(path), (0, []))
    return [name.strip() for name in names]


def csv_rows(path: Path, needed: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number, and cells by column, of each row below the header.

    Raises:
        DataError: it cannot be read, a needed column is missing, or a row is cut short.
    """
    header = csv_header(path)
    missing = [name for name in needed if name not in header]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; columns there: {', '.join(header) or 'none'}")
    rows = csv_cells(path)
    next(rows, None)
    for line, cells in rows:
        if len(cells) < len(header):
            raise DataError(f"{path}, line {line}: {len(cells)} cells, but there are {len(header)} columns")
        yield line, dict(zip(header, (cell.strip() for cell in cells), strict=False))


@dataclass(frozen=True)
class ClassFolders:
    """A data set of one folder for each class, perhaps with lists of the images of each split beside them."""

    classes: tuple[str, ...]
    """Names of the folders, in the order of the labels."""
    homes: tuple[str, ...]
    """Where below the root the class folders lie, as different archives unpack; the first one that has any counts."""
    endings: tuple[str, ...]
    """Which files are images."""
    lists: str
    """`<lists>-<split>.txt` names the images of a split, one file name a line, of any ending."""
    pixels: Pixels = PHOTOGRAPH
    """What stored values mean."""

    def listing(self, root: str | Path, split: str | None) -> Listing:
        """All images by class and name, or those of a split in the order of its list, absent ones as faulty.

        The tree may also be divided already, into `{train,val,test}/<class>/<image>`.

        Raises:
            DataError: no class folders or images, folders of other classes, no such split, or most images absent.
        """
        root = existing(root, f"one folder for each class ({self.classes[0]}, ...)")
        home = next((root / home for home in self.homes if self._has_classes(root / home)), None)
        divided = [name for name in ("train", "val", "test") if home is None and self._has_classes(root / name)]
        if home is not None:
            images = self._images(home, "")
            if images and split is not None:
                images = self._listed(images, root, split)
        else:
            parts = chosen(split, divided, root) if divided else []
            images = [image for part in parts for image in self._images(root / part, f"{part}/")]
        if not images:
            places = ", ".join(home or "the root itself" for home in self.homes)
            raise DataError(
                f"{root}: no images; expected <class>/<image> ending in {' or '.join(self.endings)} for the classes "
                f"{self.classes[0]}, {self.classes[1]}, ... in {places}, or in train, val and test"
            )
        return Listing(list(self.classes), images, self.pixels)

    def _has_classes(self, folder: Path) -> bool:
        return any((folder / name).is_dir() for name in self.classes)

    def _images(self, home: Path, prefix: str) -> list[RawSample]:
        found = {name: self._files(home / name) for name in entries(home)[1]}
        strange = [name for name, files in found.items() if files and name not in self.classes]
        if strange:
            raise DataError(
                f"{home}: {strange[0]} is no class of this data set, whose classes are {', '.join(self.classes)}"
            )
        return [
            RawSample(home / name / file, label, name=f"{prefix}{name}/{file}")
            for label, name in enumerate(self.classes)
            for file in found.get(name, ())
        ]

    def _files(self, folder: Path) -> list[str]:
        return [name for name in entries(folder)[0] if name.lower().endswith(self.endings)]

    def _listed(self, images: list[RawSample], root: Path, split: str) -> list[RawSample]:
        prefix = f"{self.lists}-"
        lists = {path.stem.removeprefix(prefix): path for path in sorted(root.glob(f"{prefix}*.txt"))}
        if not lists:
            raise DataError(f"{root}: no split '{split}'; expected a list {prefix}{split}.txt there")
        (split,) = chosen(split, lists, root)
        try:
            lines = lists[split].read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{lists[split]}: cannot be read: {error}") from None
        names = [line.strip() for line in lines if line.strip()]
        by_stem = {image.path.stem: image for image in images}
        if not names:
            raise DataError(f"{lists[split]}: no images in it")
        fault = f"absent, but listed in {lists[split].name}"
        listed = [
            by_stem.get(PurePosixPath(name).stem) or RawSample(root / name, name=name, fault=fault) for name in names
        ]
        absent = [image.name for image in listed if image.fault]
        _refuse_if_most(len(absent), len(names), next(iter(absent), ""), lists[split])
        return listed
