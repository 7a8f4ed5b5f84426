"""`manifest.json` and the rows of `index.npy`: what lies in a folder of packed shards."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Final, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from explora.bands import PHOTOGRAPH, Pixels
from explora.config import Config, validate
from explora.errors import ConfigError, DataError
from explora.runs import write_atomically

FORMAT: Final = "explora-shards"
VERSION: Final = 2
MANIFEST = "manifest.json"
INDEX = "index.npy"
LABELS = "labels.npy"
"""Of images that may have several labels each: one bit for every image and class."""
ROW = np.dtype(
    [("offset", "<u8"), ("digest", "<u8"), ("shard", "<u4"), ("size", "<u4"), ("label", "<i4"), ("group", "<i4")]
)
"""One image: where its bytes start in which shard and how many they are, the first 8 bytes of their sha256 as a
little-endian number, its class and its group (-1: none)."""
MASK_CLASSES: Final = 255
"""Classes that the pixels of a mask may have, at most."""
SHOWN: Final = 10
"""Of many faults, how many are named."""
_UNKNOWN: Final = "pack or index the images again"


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
    masks: list[str] | None = Field(None, min_length=1, max_length=MASK_CLASSES)
    """Names by number of the classes in segmentation masks, or nothing where images have none."""
    pixels: Pixels = PHOTOGRAPH
    """Bands, units and statistics."""
    shards: list[ShardFile]
    """The tar files in order."""
    fingerprint: str
    """See `fingerprint`."""
    index_sha256: str
    """Digest of `index.npy`."""
    labels_sha256: str | None = None
    """Digest of `labels.npy`, or nothing where images have one label at most."""
    skipped: list[Skipped] = Field(default_factory=list)
    """Inputs that were left out, the first 10,000."""
    left_out: int = Field(0, ge=0)
    """How many these were in all."""
    duplicates: int = Field(0, ge=0)
    """Images whose bytes an earlier image has, too."""
    overlaps: dict[str, int] = Field(default_factory=dict)
    """Images that another set has too, by the name of that set, as far as anybody compared them."""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        for what in ("samples", "bytes"):
            whole, parts = getattr(self, what), sum(getattr(shard, what) for shard in self.shards)
            if whole != parts:
                raise ValueError(f"{what}: {whole}, but the shards have {parts}")
        if len({shard.file for shard in self.shards}) != len(self.shards):
            raise ValueError("shards: a file is listed more than once")
        if self.labels_sha256 is not None and not self.classes:
            raise ValueError("labels_sha256: there are no classes")
        return self

    @property
    def again(self) -> str:
        """What mends a damaged set: only `explora pack` calls files like this."""
        packed = all(re.fullmatch(r"shard-\d{6,}\.tar", shard.file) for shard in self.shards)
        return "pack the images again" if packed else "index the tars again"


def fingerprint(
    classes: list[str] | None,
    pixels: Pixels,
    labelled: Iterable[tuple[np.ndarray, ...]],
    *,
    multilabel: bool = False,
    masks: list[str] | None = None,
) -> str:
    """sha256 over the class names, what the pixels mean, then each image's label and digest in order.

    Neither the size of shards nor statistics, groups and names enter.

    Args:
        labelled: labels and digests of some images after the other, each (n,), see `ROW`; behind them their bits in
            `labels.npy`, uint8 (n, ceil(C / 8)), if `multilabel`, and the digests of their masks (n,) if there are any.
        masks: names of the classes in masks.
    """
    said: list[Any] = [classes, pixels.model_dump(mode="json", exclude={"bands": {"__all__": {"statistics"}}})]
    if multilabel or masks is not None:
        said.append({"masks": masks, "multilabel": multilabel})
    whole = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for labels, *others in labelled:
        columns = [labels.astype("<i4"), *(other.astype("<u8" if other.ndim == 1 else "u1") for other in others)]
        whole.update(np.concatenate([column.view("u1").reshape(len(labels), -1) for column in columns], 1).tobytes())
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
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {error}; {_UNKNOWN}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of {FORMAT}; run `explora pack` on your images first")
    if raw.get("version") != VERSION:
        raise DataError(f"{path}: version {raw.get('version')}, but this explora reads version {VERSION}; {_UNKNOWN}")
    try:
        manifest = validate(Manifest, raw, path)
    except ConfigError as error:
        raise DataError(f"{path}: damaged: {error}; {_UNKNOWN}") from None
    digests = [manifest.fingerprint, manifest.index_sha256, *(shard.sha256 for shard in manifest.shards)]
    digests += [] if manifest.labels_sha256 is None else [manifest.labels_sha256]
    for digest in digests:
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise DataError(f"{path}: damaged: {digest[:80]!a} is no sha256; {_UNKNOWN}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest into a folder, all or nothing."""
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1))


def read_index(folder: Path, manifest: Manifest) -> np.ndarray:
    """The rows of `index.npy`, (samples,) of `ROW`, memory-mapped: no row is read.

    Raises:
        DataError: it is damaged, or does not belong to the manifest.
    """
    return _mapped(folder / INDEX, ROW, (manifest.samples,), manifest, f"{manifest.samples} rows of the index")


def read_labels(folder: Path, manifest: Manifest) -> np.ndarray | None:
    """The rows of `labels.npy`, uint8 (samples, ceil(C / 8)), memory-mapped: no row is read.

    Class c of an image is bit c % 8, counted from the lowest, of byte c // 8 of its row. None where images have one
    label at most.

    Raises:
        DataError: it is damaged, or does not belong to the manifest.
    """
    if manifest.labels_sha256 is None:
        return None
    classes = len(manifest.classes or ())
    shape = (manifest.samples, -(-classes // 8))
    return _mapped(
        folder / LABELS, np.dtype(np.uint8), shape, manifest, f"the labels of {shape[0]} images in {classes} classes"
    )


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], manifest: Manifest, expected: str) -> np.ndarray:
    try:
        with path.open("rb") as file:
            facts = _header(file)
            start, size = file.tell(), file.seek(0, 2)
        descr = np.lib.format.dtype_to_descr(dtype)
        if facts != {"descr": descr, "fortran_order": False, "shape": shape} or (
            size != start + math.prod(shape) * dtype.itemsize
        ):
            raise DataError(f"expected {expected}")
        return np.memmap(path, dtype, "r", start, shape)
    except OSError as error:
        raise DataError(f"{path}: damaged: {error.strerror}; {manifest.again}") from None
    except DataError as error:
        raise DataError(f"{path}: damaged: {error}; {manifest.again}") from None


def _header(file: IO[bytes]) -> object:
    """What an array file says of itself, read by hand: numpy would open archives and pickles by their first bytes."""
    if file.read(8) != b"\x93NUMPY\x01\x00":
        raise DataError("not an array of numpy's format 1.0")
    text = file.read(int.from_bytes(file.read(2), "little")).decode("latin1")
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise DataError("its header cannot be read") from None


def listed(faults: Sequence[object]) -> str:
    """The first of many faults, each on a line of its own, and how many more there are."""
    more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
    return "".join(f"\n  {fault}" for fault in [*faults[:SHOWN], *more])
