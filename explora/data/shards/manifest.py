"""`manifest.json` and the rows of `index.npy`: what lies in a folder of packed shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field

from explora.bands import PHOTOGRAPH, Pixels
from explora.config import Config, validate
from explora.errors import ConfigError, DataError
from explora.runs import write_atomically

FORMAT: Final = "explora-shards"
VERSION: Final = 2
MANIFEST = "manifest.json"
INDEX = "index.npy"
ROW = np.dtype(
    [("offset", "<u8"), ("digest", "<u8"), ("shard", "<u4"), ("size", "<u4"), ("label", "<i4"), ("group", "<i4")]
)
"""One image: where its bytes start in which shard and how many they are, the first 8 bytes of their sha256 as a
little-endian number, its class and its group (-1: none)."""


class ShardFile(Config):
    """One tar file as the manifest lists it."""

    file: str = Field(pattern=r"^[^/\\\x00]+\.tar$")
    """Name inside the shards' folder."""
    samples: int = Field(ge=1)
    """Images in this file."""
    bytes: int = Field(ge=1)
    """Size of the file."""
    sha256: str
    """Digest of the whole file."""


class Skipped(Config):
    """An input image that was left out."""

    path: str
    """The image, as the recipe names it."""
    reason: str
    """Why."""


class Groups(Config):
    """A second partition of the images, beside their classes."""

    by: str
    """What tells the groups apart, such as `region`."""
    names: list[str] = Field(min_length=1)
    """Names by group number."""


class Manifest(Config):
    """The content of `manifest.json`."""

    format: Literal["explora-shards"] = FORMAT
    """Tells our shards from any other folder of tars."""
    version: Literal[2] = VERSION
    """Raised when the layout changes."""
    name: str
    """What the user calls this data."""
    samples: int = Field(ge=1)
    """Images in all shards."""
    bytes: int = Field(ge=1)
    """Size of all shards."""
    classes: list[str] | None
    """Class names by label, or nothing for unlabelled images."""
    groups: Groups | None = None
    """Groups by number, or nothing."""
    pixels: Pixels = PHOTOGRAPH
    """Bands, units and statistics."""
    shards: list[ShardFile]
    """The tar files in order."""
    fingerprint: str
    """See `fingerprint`."""
    skipped: list[Skipped] = Field(default_factory=list)
    """Inputs that were left out, the first 10,000."""
    left_out: int = Field(0, ge=0)
    """How many these were in all."""
    duplicates: int = Field(0, ge=0)
    """Images whose bytes an earlier image has, too."""
    overlaps: dict[str, int] = Field(default_factory=dict)
    """Images that another set has too, by the name of that set, as far as anybody compared them."""


def fingerprint(classes: list[str] | None, pixels: Pixels, labelled: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    """sha256 over the class names, what the pixels mean, then each image's label and digest in order.

    Neither the size of shards nor statistics, groups and names enter.

    Args:
        labelled: labels and digests of some images after the other, each (n,), see `ROW`.
    """
    meaning = pixels.model_dump(mode="json", exclude={"bands": {"__all__": {"statistics"}}})
    whole = hashlib.sha256(json.dumps([classes, meaning], sort_keys=True).encode())
    for labels, digests in labelled:
        both = np.empty(len(labels), np.dtype([("label", "<i4"), ("digest", "<u8")]))
        both["label"], both["digest"] = labels, digests
        whole.update(both.tobytes())
    return whole.hexdigest()


def digest(blob: bytes) -> int:
    """What `ROW` keeps of an image's bytes."""
    return int.from_bytes(hashlib.sha256(blob).digest()[:8], "little")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        DataError: there is no such folder, it was not packed, or the manifest is damaged or of another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; pack your images into it with `explora pack`")
    try:
        raw: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not packed shards (no {MANIFEST}); run `explora pack` on your images first"
        ) from None
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of {FORMAT}; run `explora pack` on your images first")
    if raw.get("version") != VERSION:
        raise DataError(
            f"{path}: version {raw.get('version')}, but this explora reads version {VERSION}; pack the images again"
        )
    try:
        return validate(Manifest, raw, path)
    except ConfigError as error:
        raise damaged(path, str(error)) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest into a folder, all or nothing."""
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1))


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """The rows of `index.npy`, (samples,) of `ROW`, memory-mapped.

    Raises:
        DataError: it is damaged, or does not belong to the manifest.
    """
    path = folder / INDEX
    try:
        index: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, str(error)) from None
    if index.dtype != ROW or index.shape != (manifest.samples,):
        raise damaged(path, f"expected {manifest.samples} rows of the index")
    return index


def damaged(path: Path, reason: str) -> DataError:
    """The error for a file that is not what was packed."""
    return DataError(f"{path}: damaged: {reason}; pack the images again")
