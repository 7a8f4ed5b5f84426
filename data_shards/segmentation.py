"""Images and masks of the same names side by side: `<root>/images/<name>.<ext>` and `<root>/masks/<name>.png`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_shards.layout import chosen, entries, existing, joined
from explora.data.shards.adopt import CLASSES, class_names
from explora.data.shards.listing import EXTENSIONS, Listing, RawSample
from explora.errors import DataError

IMAGES, MASKS = "images", "masks"
"""Folders of a split, or of the root where there are no splits."""
ENDINGS = (".png", ".tif", ".tiff")
"""Of masks: formats that keep numbers as they are. Of two masks of one image the first one here counts."""
_EXPECTED = f"{IMAGES}/<name>.<ext>, {MASKS}/<name>.png and {CLASSES}"


def samples(root: str | Path, split: str | None = None) -> Listing:
    """The images in sorted order, without labels, and the mask of the same name for each.

    `classes.txt` in the root, or beside it where the root is one split of several, names the classes of pixels, one
    to a line, in the order of their numbers; 255 is no class. A split is a subfolder of the root that holds `images`
    and `masks`.

    Raises:
        DataError: a folder, the split or the names of the classes are missing; there are no images.
    """
    root = existing(root, _EXPECTED)
    folders = entries(root)[1]
    whole = IMAGES in folders
    divided = [name for name in folders if not whole and IMAGES in entries(root / name)[1]]
    if not whole and not divided:
        raise DataError(f"{root}: no folder {IMAGES}; expected {_EXPECTED}, or the first two for each split")
    parts = [root / name for name in chosen(split, divided, root)] if divided or split is not None else [root]
    named = root.parent if whole and not (root / CLASSES).exists() and (root.parent / CLASSES).exists() else root
    return Listing(None, joined(parts, partial(_images, root)), masks=class_names(named / CLASSES))


def _images(root: Path, part: Path) -> Iterator[RawSample]:
    there = set(entries(part / MASKS)[0])
    for file in entries(part / IMAGES)[0]:
        if Path(file).suffix.lower() in EXTENSIONS:
            path, stem = part / IMAGES / file, Path(file).stem
            mask = next((stem + ending for ending in ENDINGS if stem + ending in there), "")
            name, fault = str(path.relative_to(root)), "" if mask else f"no mask {MASKS}/{stem}.png"
            yield RawSample(path, name=name, fault=fault, mask=part / MASKS / mask if mask else None)
