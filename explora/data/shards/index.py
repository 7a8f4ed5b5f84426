"""Packed shards: random access to any image through the offset index."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import tarfile
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, Final, NamedTuple, TypeVar

import numpy as np

from explora.bands import Pixels
from explora.data.decode import decode
from explora.data.shards.crew import Count, Progress, work
from explora.data.shards.manifest import (
    INDEX,
    Manifest,
    Skipped,
    digest,
    fingerprint,
    listed,
    read_index,
    read_manifest,
)
from explora.data.tars import Sample, samples
from explora.errors import DataError, RunError

OPEN: Final = 256
"""Tar files that a set holds open at a time, at most."""
CHUNK: Final = 1 << 20
"""Rows of the index that are looked at together."""

Made = TypeVar("Made")


class ShardSet:
    """A folder that `pack` wrote: images by number, labels, class names.

    Opening it reads no image and no row of the index, so it costs the same for ten images as for ten million.
    Safe to fork, to pickle and to read from many threads: reads never move a file position, and a pickle holds no rows.
    """

    def __init__(self, folder: Path, manifest: Manifest, index: np.ndarray, rows: np.ndarray | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._rows = rows
        # A view that is no `memmap` any more: its rows come several times as fast.
        self.index = index.view(np.ndarray)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._tar = lru_cache(min(OPEN, files // 8))(_opener(folder, manifest))

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open packed shards and compare file sizes with the manifest.

        Raises:
            DataError: the folder is missing, is not packed, or a file in it is damaged.
        """
        shards = cls.trusted(folder)
        for shard in shards.manifest.shards:
            if fault := _resized(shards.folder / shard.file, shard.bytes):
                raise DataError(f"{fault}; {shards.manifest.again}")
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
        if self._rows is None:
            return self.manifest.fingerprint
        return hashlib.sha256(self.manifest.fingerprint.encode() + self._rows.tobytes()).hexdigest()

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
        """Class of each image, int32 (n,), -1 without one.

        Raises:
            DataError: the index has one that is no class.
        """
        return self._numbers("label", len(self.classes or ()))

    @cached_property
    def groups(self) -> np.ndarray:
        """Group of each image, int32 (n,), -1 without one; see `manifest.groups`.

        Raises:
            DataError: the index has one that is no group.
        """
        return self._numbers("group", len(self.manifest.groups.names if self.manifest.groups else ()))

    def __len__(self) -> int:
        return len(self.index)

    def taking(self, rows: np.ndarray) -> ShardSet:
        """Some of the images, by their numbers, in that order; labels stay those of all classes."""
        assert self._rows is None, "taken already"
        rows = np.asarray(rows, np.int64)
        return ShardSet(self.folder, self.manifest, self.index[rows], rows)

    def read(self, index: int) -> bytes:
        """The stored bytes of image `index`, as they were in the packed file.

        Raises:
            DataError: the shard is not the one that was packed.
            RunError: it cannot be read.
        """
        return self._made(index, lambda blob: blob)

    def image(self, index: int, *, least: int | None = None) -> np.ndarray:
        """Image `index`, decoded: (H, W, bands) of the stored type.

        Args:
            least: see `decode`.

        Raises:
            DataError: names the shard, the place in it and the reason.
            RunError: the shard cannot be read.
        """
        return self._made(index, lambda blob: decode(blob, self.pixels, least=least))

    def where(self, index: int) -> str:
        """Shard file, number and name (or else the place) of an image, for messages."""
        try:
            number, offset, _ = self._place(index)
        except DataError:
            return f"{self.folder / INDEX}: image {index}"
        try:
            header = os.pread(self._tar(number).descriptor, tarfile.BLOCKSIZE, max(offset - tarfile.BLOCKSIZE, 0))
            place = ascii(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[1:-1]
        except (OSError, ValueError, tarfile.TarError):
            place = f"byte {offset}"
        return f"{self.folder / self.manifest.shards[number].file}: image {index} ({place})"

    def source(self, index: int) -> str:
        """What image `index` was called before it was packed; of an adopted tar, see `where`."""

        def opened() -> IO[bytes]:
            file = (self.folder / self.manifest.shards[number].file).open("rb")
            file.seek(max(offset - tarfile.BLOCKSIZE, 0))
            return file

        with suppress(ValueError, LookupError, TypeError, RecursionError):  # DataError is a ValueError
            number, offset, _ = self._place(index)
            with closing(samples(opened, {"json"})) as found:
                return str(json.loads(next(found, Sample("")).facts("json") or b"")["path"])
        return self.where(index)

    def _made(self, index: int, make: Callable[[bytes], Made]) -> Made:
        """What comes of the bytes of an image; any fault with the place and what mends it."""
        try:
            return make(self._bytes(index))
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}; {self.manifest.again}") from None

    def _bytes(self, index: int) -> bytes:
        number, offset, size = self._place(index)
        try:
            tar = self._tar(number)
            blob = os.pread(tar.descriptor, size, offset)
        except OSError as error:
            # The disk's or the process's fault, not the image's: another one must not stand in for it.
            raise RunError(
                f"{self.where(index)}: cannot be read: {error.strerror}; run the same command again"
            ) from None
        if len(blob) != size:
            raise DataError("the file ends too early")
        return blob

    def _place(self, index: int) -> tuple[int, int, int]:
        """Number of the shard, first byte and how many: of all that reads, the one that looks at the index.

        Raises:
            DataError: they are outside the shards.
        """
        offset, _, number, size, _, _ = self.index[index].item()
        if number >= len(self.manifest.shards) or offset + size > self.manifest.shards[number].bytes:
            raise DataError("points outside the shards")
        return number, offset, size

    def _numbers(self, field: str, count: int) -> np.ndarray:
        numbers = np.ascontiguousarray(self.index[field], dtype=np.int32)
        if numbers.min() < -1 or numbers.max() >= count:
            wrong = int(np.flatnonzero((numbers < -1) | (numbers >= count))[0])
            raise DataError(
                f"{self.folder / INDEX}: image {wrong} has {field} {numbers[wrong]}, but the manifest names {count}; "
                f"{self.manifest.again}"
            )
        return numbers

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
        if self._reindexed() or fingerprint(self.classes, self.pixels, labelled) != self.fingerprint:
            faults.append(f"{self.folder / INDEX}: not the index that was packed")
        if faults:
            raise DataError(f"{self.folder}: damaged, {len(faults)} fault(s); {self.manifest.again}{listed(faults)}")

    def _reindexed(self) -> bool:
        try:
            with (self.folder / INDEX).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() != self.manifest.index_sha256
        except OSError:
            return True

    def close(self) -> None:
        """Close the tar files; the next read opens them again."""
        self._tar.cache_clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self._rows)


def _reopened(folder: Path, rows: np.ndarray | None) -> ShardSet:
    whole = ShardSet.trusted(folder)
    return whole if rows is None else whole.taking(rows)


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
    if fault := _resized(path, shard.bytes):
        return [fault]
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                faults.append(f"{path}: its content has changed since it was packed")
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    for index in range(task.end - shard.samples, task.end):
        if fault := _differs(shards, index, task.number):
            faults.append(f"{shards.where(index)}: {fault}")
        count(1)
    return faults


def _differs(shards: ShardSet, index: int, number: int) -> str:
    row = shards.index[index]
    try:
        same = int(row["shard"]) == number and digest(shards._bytes(index)) == int(row["digest"])
    except DataError as error:
        return str(error)
    return "" if same else "not the image that was packed"


def _resized(path: Path, expected: int) -> str:
    """What is wrong with the size of a file."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: damaged: {error.strerror}"
    return f"{path}: damaged: {size} bytes, but {expected} were packed" if size != expected else ""
