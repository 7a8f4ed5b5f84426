"""`manifest.json` and the rows of `index.npy`: what lies in a folder of packed shards."""

from __future__ import annotations

import ast
import hashlib
import json
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
ROW = np.dtype(
    [("offset", "<u8"), ("digest", "<u8"), ("shard", "<u4"), ("size", "<u4"), ("label", "<i4"), ("group", "<i4")]
)
"""One image: where its bytes start in which shard and how many they are, the first 8 bytes of their sha256 as a
little-endian number, its class and its group (-1: none)."""
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
    pixels: Pixels = PHOTOGRAPH
    """Bands, units and statistics."""
    shards: list[ShardFile]
    """The tar files in order."""
    fingerprint: str
    """See `fingerprint`."""
    index_sha256: str
    """Digest of `index.npy`."""
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
        return self

    @property
    def again(self) -> str:
        """What mends a damaged set: only `explora pack` calls files like this."""
        packed = all(re.fullmatch(r"shard-\d{6,}\.tar", shard.file) for shard in self.shards)
        return "pack the images again" if packed else "index the tars again"


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
    path, rows = folder / INDEX, manifest.samples
    try:
        with path.open("rb") as file:
            facts = _header(file)
            start, size = file.tell(), file.seek(0, 2)
        expected = {"descr": ROW.descr, "fortran_order": False, "shape": (rows,)}
        if facts != expected or size != start + rows * ROW.itemsize:
            raise DataError(f"expected {rows} rows of the index")
        return np.memmap(path, ROW, "r", start, (rows,))
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
