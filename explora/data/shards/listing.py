"""What a recipe in `data_shards/` tells of a data set: which images there are, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from explora.bands import PHOTOGRAPH, Pixels
from explora.data.shards.manifest import Groups

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Endings of the files that are images."""


@dataclass(frozen=True)
class RawSample:
    """One image on disk."""

    path: Path
    label: int | tuple[int, ...] = -1
    """Number of its class, -1 without one; or the numbers of all its classes, perhaps none, where it may have several.
    All images of a listing say it in the same way."""
    group: int = -1
    """Number of its group, -1 without one."""
    name: str = ""
    """The path to record, relative to the data set; the bare file name when empty."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, width and height in pixels of the part to pack, cut at the borders; None packs the file as it is."""
    fault: str = ""
    """Why it cannot be packed, where the recipe knows already; it is left out with this reason."""
    mask: Path | None = None
    """A PNG or TIFF of the same height and width that says the class of each pixel, see `decode_mask`."""

    @property
    def recorded(self) -> str:
        """What shards and messages call this image."""
        # File names need not be valid text; a manifest must be.
        return (self.name or self.path.name).encode(errors="replace").decode()


class Listing(NamedTuple):
    """All images of a data set or of one of its splits."""

    classes: list[str] | None
    """Class names by label, None for unlabelled images."""
    samples: Iterable[RawSample]
    """The images, in an order that hangs on the data set alone."""
    pixels: Pixels = PHOTOGRAPH
    """What the stored values mean; statistics are left to `explora pack`."""
    groups: Groups | None = None
    """Groups by number."""
    masks: list[str] | None = None
    """Names by number of the classes in masks; None where images have none."""


Recipe: TypeAlias = Callable[[Path, str | None], Listing]
"""Root of a data set and the name of a split (None: all of it) to the images in it."""
