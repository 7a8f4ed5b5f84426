"""Packed shards: random access to any image through the offset index."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from explora.bands import Pixels
from explora.data.decode import decode
from explora.data.manifest import INDEX, Manifest, Skipped, damaged, digest, read_index, read_manifest
from explora.errors import DataError


class ShardSet:
    """A folder that `pack` wrote: images by number, labels, class names.

    Opening it reads no image and no row of the index, so it costs the same for ten images as for ten million.
    Safe to fork and to pickle: each process opens the tars for itself, and reads never move a file position.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray) -> None:
        self.folder = folder
        self.manifest = manifest
        self.index = index
        self._files: dict[int, int] = {}
        self._pid = os.getpid()

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open packed shards and compare file sizes with the manifest.

        Raises:
            DataError: the folder is missing, is not packed, or a file in it is damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            _check_size(folder / shard.file, shard.bytes)
        return cls(folder, manifest, read_index(folder, manifest))

    @property
    def name(self) -> str:
        """What the user calls this data."""
        return self.manifest.name

    @property
    def fingerprint(self) -> str:
        """Digest of class names, labels, images and what their pixels mean, the same for any shard size."""
        return self.manifest.fingerprint

    @property
    def classes(self) -> list[str] | None:
        """Class names by label, or None for unlabelled images."""
        return self.manifest.classes

    @property
    def pixels(self) -> Pixels:
        """What the stored values mean."""
        return self.manifest.pixels

    @property
    def skipped(self) -> list[Skipped]:
        """Inputs that were not packed, with the reason."""
        return self.manifest.skipped

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 (n,), -1 without one."""
        return np.ascontiguousarray(self.index["label"], dtype=np.int32)

    @cached_property
    def groups(self) -> np.ndarray:
        """Group of each image, int32 (n,), -1 without one; see `manifest.groups`."""
        return np.ascontiguousarray(self.index["group"], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> bytes:
        """The stored bytes of image `index`, as they were in the packed file.

        Raises:
            DataError: the shard cannot be read, or is not the one that was packed.
        """
        row = self.index[index]
        number, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        if number >= len(self.manifest.shards) or offset + size > self.manifest.shards[number].bytes:
            raise damaged(self.folder / INDEX, f"image {index} points outside the shards")
        try:
            blob = os.pread(self._file(number), size, offset)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read: {error.strerror}") from None
        if len(blob) != size:
            raise DataError(f"{self.where(index)}: the file ends too early; pack the images again")
        return blob

    def image(self, index: int) -> np.ndarray:
        """Image `index`, decoded: (H, W, bands) of the stored type.

        Raises:
            DataError: names the shard, the place in it and the reason.
        """
        try:
            return decode(self.read(index))
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}; pack the images again") from None

    def where(self, index: int) -> str:
        """Shard file, number and place of an image, for messages."""
        row = self.index[index]
        return f"{self._path(int(row['shard']))}: image {index} at byte {int(row['offset'])}"

    def verify(self) -> None:
        """Read everything once and compare the digests of the files and the images.

        Raises:
            DataError: names the first file that is not what was packed.
        """
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise damaged(path, "its content has changed since it was packed")
        for index in range(len(self)):
            if digest(self.read(index)) != int(self.index[index]["digest"]):
                raise damaged(self.folder / INDEX, "it does not lead to the images that were packed")

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


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None
    if size != expected:
        raise damaged(path, f"{size} bytes, but {expected} were packed")
