"""Any folder of images: `<root>/<class>/<file>`, or `<root>/<file>` without labels."""

from __future__ import annotations

from pathlib import Path

from explora.data.listing import EXTENSIONS, Listing, RawSample
from explora.errors import DataError


def samples(root: str | Path, split: str | None = None) -> Listing:
    """Class names (sorted subfolders; None for a flat folder) and the images in sorted order.

    A split is a subfolder of the root.

    Raises:
        DataError: the folder is missing, holds no images, or mixes or nests images and folders.
    """
    root = Path(root, split or "")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected {root}/<class>/<image> or {root}/<image>")
    files, folders = _listing(root)
    if files and folders:
        raise DataError(
            f"{root}: images ({files[0].name}, ...) and folders ({folders[0].name}, ...) side by side; "
            f"use either one folder for each class or only images"
        )
    if files:
        return Listing(None, (RawSample(path, name=path.name) for path in files))
    classes = {folder.name: _class_images(folder) for folder in folders}
    if not any(classes.values()):
        raise DataError(
            f"{root}: no images; looked for <class>/<image> and <image> ending in {', '.join(sorted(EXTENSIONS))}"
        )
    images = (
        RawSample(path, label, name=f"{name}/{path.name}")
        for label, (name, paths) in enumerate(classes.items())
        for path in paths
    )
    return Listing(list(classes), images)


def _class_images(folder: Path) -> list[Path]:
    files, folders = _listing(folder)
    if folders:
        raise DataError(
            f"{folder}: contains the folder {folders[0].name}, but a class folder holds images only; "
            f"expected <root>/<class>/<image>: perhaps {folder} itself is the root?"
        )
    return files


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Image files and subfolders, each sorted by name."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")))
    files = [path for path in entries if path.suffix.lower() in EXTENSIONS and path.is_file()]
    return files, [path for path in entries if path.is_dir()]
