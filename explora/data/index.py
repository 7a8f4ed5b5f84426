"""Packed shards: what lies in the folder, and random access to any image through the offset index."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import simplejpeg
from PIL import Image
from pydantic import Field

from explora.config import Config, validate
from explora.errors import ConfigError, DataError

FORMAT: Final = "explora-shards"
VERSION: Final = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
ROW = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<i4"), ("key", "S64")])
MAX_PIXELS = 100_000_000

_PIL_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_PIL_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ShardFile(Config):
    """One tar file as the manifest lists it."""

    file: str = Field(pattern=r"^shard-\d{6,}\.tar$")
    """Name inside the shards' folder."""
    samples: int = Field(ge=1)
    """Images in this file."""
    bytes: int = Field(ge=1)
    """Size of the file."""
    sha256: str
    """Digest of the whole file."""


class Skipped(Config):
    """An input image that was not packed."""

    path: str
    """The image, as the recipe names it."""
    reason: str
    """Why it was left out."""


class Manifest(Config):
    """The content of `manifest.json`."""

    format: Literal["explora-shards"] = FORMAT
    """Tells our shards from any other folder of tars."""
    version: Literal[1] = VERSION
    """Raised when the layout changes."""
    name: str
    """What the user calls this data."""
    samples: int = Field(ge=1)
    """Images in all shards."""
    bytes: int = Field(ge=1)
    """Size of all shards."""
    classes: list[str] | None
    """Class names by label, or nothing for unlabelled images."""
    shards: list[ShardFile]
    """The tar files in order."""
    fingerprint: str
    """Digest of class names, labels and image bytes in order; the shard size does not enter."""
    skipped: list[Skipped] = Field(default_factory=list)
    """Inputs that could not be decoded."""


class Fingerprint:
    """sha256 over the class names, then each sample's label and the sha256 of its image bytes."""

    def __init__(self, classes: list[str] | None) -> None:
        self._hash = hashlib.sha256(json.dumps(classes).encode())

    def add(self, label: int, blob: bytes) -> None:
        self._hash.update(label.to_bytes(4, "little", signed=True) + hashlib.sha256(blob).digest())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class ShardSet:
    """A folder that `pack` wrote: images by number, labels, class names.

    Safe to fork and to pickle: each process opens the tars for itself, and reads never move a file position.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray) -> None:
        self.folder = folder
        self.manifest = manifest
        self.labels: np.ndarray = np.ascontiguousarray(index["label"], dtype=np.int32)
        self._index = index
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open packed shards and compare file sizes with the manifest; reads no image.

        Raises:
            DataError: the folder is missing, is not packed, or a file in it is damaged.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for shard in manifest.shards:
            _check_size(folder / shard.file, shard.bytes)
        return cls(folder, manifest, _read_index(folder / INDEX, manifest))

    @property
    def name(self) -> str:
        """What the user calls this data."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """Digest of class names, labels and images, the same for any shard size."""
        return self.manifest.fingerprint

    @property
    def classes(self) -> list[str] | None:
        """Class names by label, or None for unlabelled images."""
        return self.manifest.classes

    @property
    def skipped(self) -> list[Skipped]:
        """Inputs that were not packed, with the reason."""
        return self.manifest.skipped

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> bytes:
        """The stored bytes of image `index`, as they were in the packed file.

        Raises:
            DataError: the shard cannot be read.
        """
        row = self._index[index]
        size = int(row["size"])
        try:
            blob = os.pread(self._file(int(row["shard"])), size, int(row["offset"]))
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read: {error.strerror}") from None
        if len(blob) != size:
            raise DataError(f"{self.where(index)}: the file ends too early; pack the images again")
        return blob

    def image(self, index: int) -> np.ndarray:
        """Image `index`, decoded: uint8 (H, W, 3), RGB.

        Raises:
            DataError: names the shard, the key and the reason.
        """
        try:
            return decode(self.read(index))
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}; pack the images again") from None

    def where(self, index: int) -> str:
        """Shard file and key of an image, for messages."""
        row = self._index[index]
        return f"{self._path(int(row['shard']))}: image {row['key'].decode()}"

    def verify(self) -> None:
        """Read everything once and compare the digests of the files, the labels and the images.

        Raises:
            DataError: names the first file that is not what was packed.
        """
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise _damaged(path, "its content has changed since it was packed")
        found = Fingerprint(self.classes)
        for index, label in enumerate(self.labels):
            found.add(int(label), self.read(index))
        if found.hexdigest() != self.fingerprint:
            raise _damaged(self.folder / INDEX, "it does not lead to the images that were packed")

    def close(self) -> None:
        """Close the tar files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _path(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].file

    def _file(self, shard: int) -> int:
        if self._pid != os.getpid():
            self.close()
            self._pid = os.getpid()
        if shard not in self._files:
            self._files[shard] = os.open(self._path(shard), os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        self.close()


def decode(blob: bytes) -> np.ndarray:
    """Decode a JPEG, PNG, WebP, BMP or TIFF to RGB, uint8 (H, W, 3). Alpha is dropped, grey repeated.

    Raises:
        DataError: the bytes are no such image, are truncated, hold more than 8 bits a channel in one grey
            band, or the image has more than 100 megapixels.
    """
    if not blob.startswith(b"\xff\xd8"):
        return _decode_other(blob)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(blob)
        if colorspace in ("CMYK", "YCCK"):
            return _decode_other(blob)
        _check_pixels(int(height), int(width))
        return simplejpeg.decode_jpeg(blob, colorspace="RGB")
    except ValueError as error:
        # DataError is a ValueError too, and already says what is wrong.
        raise error if isinstance(error, DataError) else _undecodable(error) from None


def _decode_other(blob: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # PIL warns of odd metadata, which we do not use, and of sizes, for which we have our own bound.
            warnings.simplefilter("ignore")
            return _decode_pil(blob)
    except _PIL_FAILURES as error:
        raise error if isinstance(error, DataError) else _undecodable(error) from None


def _decode_pil(blob: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(blob), formats=_PIL_FORMATS) as picture:
        _check_pixels(picture.height, picture.width)
        if picture.mode == "F" or picture.mode.startswith("I"):
            raise DataError(f"{picture.mode} pixels are not 8 bits a channel; convert the image first")
        image = picture.convert("RGBA") if "transparency" in picture.info else picture
        return np.array(image.convert("RGB"))


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels is above the bound of {MAX_PIXELS}; cut the image into tiles")


def _undecodable(error: BaseException) -> DataError:
    return DataError(f"not a whole, readable image ({error})")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; pack your images into it with `explora pack`")
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: not packed shards (no {MANIFEST}); run `explora pack` on your images first"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of {FORMAT}; run `explora pack` on your images first")
    if raw.get("version") != VERSION:
        raise DataError(
            f"{path}: version {raw.get('version')}, but this explora reads version {VERSION}; pack the images again"
        )
    try:
        return validate(Manifest, raw, path)
    except ConfigError as error:
        raise _damaged(path, str(error)) from None


def _read_index(path: Path, manifest: Manifest) -> np.ndarray:
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from None
    if index.dtype != ROW or index.shape != (manifest.samples,):
        raise _damaged(path, f"expected {manifest.samples} rows of the index")
    sizes = np.array([shard.bytes for shard in manifest.shards], dtype=np.uint64)
    if index["shard"].max() >= len(sizes) or (index["offset"] + index["size"] > sizes[index["shard"]]).any():
        raise _damaged(path, "it points outside the shards")
    return index


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _damaged(path, str(error.strerror)) from None
    if size != expected:
        raise _damaged(path, f"{size} bytes, but {expected} were packed")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: damaged: {reason}; pack the images again")
