"""Packed shards: random access to any image through the offset index."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from explora.bands import Pixels
from explora.data.decode import decode
from explora.data.shards.crew import Count, Progress, work
from explora.data.shards.manifest import (
    INDEX,
    Manifest,
    Skipped,
    damaged,
    digest,
    fingerprint,
    read_index,
    read_manifest,
)
from explora.errors import DataError

OPEN: Final = 256
"""Tar files that a set holds open at a time, at most."""
SHOWN: Final = 10
"""Faults that `ShardSet.verify` names."""
CHUNK: Final = 1 << 20
"""Rows of the index that are looked at together."""


class ShardSet:
    """A folder that `pack` wrote: images by number, labels, class names.

    Opening it reads no image and no row of the index, so it costs the same for ten images as for ten million.
    Safe to fork, to pickle and to read from many threads: reads never move a file position, and a pickle holds no rows.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray) -> None:
        self.folder = folder
        self.manifest = manifest
        # A view that is no `memmap` any more: its rows come several times as fast.
        self.index = index.view(np.ndarray)
        self._tar = lru_cache(OPEN)(_opener(folder, manifest))

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open packed shards and compare file sizes with the manifest.

        Raises:
            DataError: the folder is missing, is not packed, or a file in it is damaged.
        """
        shards = cls.trusted(folder)
        for shard in shards.manifest.shards:
            _check_size(shards.folder / shard.file, shard.bytes)
        return shards

    @classmethod
    def trusted(cls, folder: str | Path) -> ShardSet:
        """Open packed shards without a look at the tar files.

        Raises:
            DataError: the folder is missing, is not packed, or its manifest or index is damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
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
        offset, _, number, size, _, _ = self.index[index].item()
        if number >= len(self.manifest.shards) or offset + size > self.manifest.shards[number].bytes:
            raise damaged(self.folder / INDEX, f"image {index} points outside the shards")
        try:
            tar = self._tar(number)
            blob = os.pread(tar.descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{self.where(index)}: cannot be read: {error.strerror}") from None
        if len(blob) != size:
            raise DataError(f"{self.where(index)}: the file ends too early; pack the images again")
        return blob

    def image(self, index: int, *, least: int | None = None) -> np.ndarray:
        """Image `index`, decoded: (H, W, bands) of the stored type.

        Args:
            least: see `decode`.

        Raises:
            DataError: names the shard, the place in it and the reason.
        """
        try:
            return decode(self.read(index), self.pixels, least=least)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}; pack the images again") from None

    def where(self, index: int) -> str:
        """Shard file, number and name (or else the place) of an image, for messages."""
        offset, _, number, _, _, _ = self.index[index].item()
        if number >= len(self.manifest.shards):
            return f"{self.folder / INDEX}: image {index}"
        try:
            header = os.pread(self._tar(number).descriptor, tarfile.BLOCKSIZE, max(offset - tarfile.BLOCKSIZE, 0))
            place = ascii(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[1:-1]
        except (OSError, tarfile.HeaderError):
            place = f"byte {offset}"
        return f"{self.folder / self.manifest.shards[number].file}: image {index} ({place})"

    def source(self, index: int) -> str:
        """What image `index` was called before it was packed; of an adopted tar, see `where`."""
        offset, _, number, _, _, _ = self.index[index].item()
        path = self.folder / self.manifest.shards[number].file
        with suppress(OSError, ValueError, LookupError, TypeError, tarfile.TarError), path.open("rb") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in itertools.islice(tar, 3):
                    if member.name.endswith(".json"):
                        file.seek(member.offset_data)
                        return str(json.loads(file.read(member.size))["path"])
        return self.where(index)

    def verify(self, *, workers: int | None = 0, progress: Progress | None = None) -> None:
        """Read everything once and compare sizes and digests of the files, and the digest of each image.

        Args:
            workers: processes; 0 works in this one, None takes as many as there are cores for this process.

        Raises:
            DataError: says how many files and images are not what was packed, and names the first ten.
        """
        ends = np.cumsum([shard.samples for shard in self.manifest.shards])
        tasks = [_Check(self, number, int(end)) for number, end in enumerate(ends)]
        found = work(_faults, tasks, workers, progress=progress, total=len(self))
        faults = [fault for some in found for fault in some]
        chunks = (self.index[start : start + CHUNK] for start in range(0, len(self), CHUNK))
        labelled = ((chunk["label"], chunk["digest"]) for chunk in chunks)
        if fingerprint(self.classes, self.pixels, labelled) != self.fingerprint:
            faults.append(f"{self.folder / INDEX}: its labels and digests are not those that were packed")
        if faults:
            more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise DataError(
                f"{self.folder}: damaged, {len(faults)} fault(s); pack the images again\n  "
                + "\n  ".join(faults[:SHOWN])
                + more
            )

    def close(self) -> None:
        """Close the tar files; the next read opens them again."""
        self._tar.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet.trusted, (self.folder,)


def overlap(a: ShardSet, b: ShardSet) -> np.ndarray:
    """Numbers of the images of `a` whose bytes are in `b`, too, in order."""
    return np.flatnonzero(among(a.index["digest"], b.index["digest"]))


def among(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which digests are among the others, bool of their shape; in a fraction of the memory of `numpy.isin`."""
    known = np.sort(others)
    found: np.ndarray = known[np.searchsorted(known, digests).clip(max=len(known) - 1)] == digests
    return found


class _Open:
    """An open file that is closed when nobody reads from it any more, so that no read finds its descriptor reused."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


def _opener(folder: Path, manifest: Manifest) -> Callable[[int], _Open]:
    # Not a method: remembering that would keep the set, and its files, from being freed when it is let go.
    return lambda number: _Open(folder / manifest.shards[number].file)


class _Check(NamedTuple):
    """One shard to verify."""

    shards: ShardSet
    number: int
    end: int
    """Number of the first image behind it."""


def _faults(task: _Check, count: Count) -> list[str]:
    """What is wrong with a shard."""
    shards = task.shards
    shard = shards.manifest.shards[task.number]
    path = shards.folder / shard.file
    faults = []
    try:
        _check_size(path, shard.bytes)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                faults.append(f"{path}: its content has changed since it was packed")
    except (DataError, OSError) as error:
        return [str(error).removesuffix("; pack the images again")]
    for index in range(task.end - shard.samples, task.end):
        faults += _fault(shards, index, task.number)
        count(1)
    return faults


def _fault(shards: ShardSet, index: int, number: int) -> list[str]:
    row = shards.index[index]
    try:
        if int(row["shard"]) == number and digest(shards.read(index)) == int(row["digest"]):
            return []
    except DataError as error:
        return [str(error).removesuffix("; pack the images again")]
    return [f"{shards.where(index)}: not the image that was packed"]


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise damaged(path, str(error.strerror)) from None
    if size != expected:
        raise damaged(path, f"{size} bytes, but {expected} were packed")
