"""Any folder of images: `<root>/<class>/<file>`, or `<root>/<file>` without labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_shards.layout import Samples, chosen, entries, existing
from explora.data.shards.listing import EXTENSIONS, Listing, RawSample
from explora.errors import DataError


def samples(root: str | Path, split: str | None = None) -> Listing:
    """Class names (sorted subfolders; None for a flat folder) and the images in sorted order.

    A split is a subfolder of the root.

    Raises:
        DataError: the folder or the split is missing, holds no images, or mixes or nests images and folders.
    """
    root = existing(root, "<class>/<image> or <image>")
    if split is not None:
        root /= chosen(split, entries(root)[1], root)[0]
    files, classes = _images(root)
    if files and classes:
        raise DataError(
            f"{root}: images ({files[0]}, ...) and folders ({classes[0]}, ...) side by side; "
            f"use either one folder for each class or only images"
        )
    if files:
        return Listing(None, Samples(lambda: (RawSample(root / file, name=file) for file in _images(root)[0])))
    if sum(_count(root / name) for name in classes) == 0:
        raise DataError(
            f"{root}: no images; looked for <class>/<image> and <image> ending in {', '.join(sorted(EXTENSIONS))}"
        )
    return Listing(classes, Samples(lambda: _labelled(root, classes)))


def _labelled(root: Path, classes: list[str]) -> Iterator[RawSample]:
    for label, name in enumerate(classes):
        for file in _images(root / name)[0]:
            yield RawSample(root / name / file, label, name=f"{name}/{file}")


def _count(folder: Path) -> int:
    """Images of a class."""
    files, folders = _images(folder)
    if folders:
        raise DataError(
            f"{folder}: contains the folder {folders[0]}, but a class folder holds images only; "
            f"expected <root>/<class>/<image>: perhaps {folder} itself is the root?"
        )
    return len(files)


def _images(folder: Path) -> tuple[list[str], list[str]]:
    """Names of image files and of subfolders, each sorted."""
    files, folders = entries(folder)
    return [name for name in files if Path(name).suffix.lower() in EXTENSIONS], folders
