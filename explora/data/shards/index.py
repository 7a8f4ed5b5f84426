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
from typing import IO, Any, Final, TypeVar

import numpy as np

from explora.bands import Pixels
from explora.data.decode import decode
from explora.data.shards.checking import faults, resized
from explora.data.shards.crew import Progress
from explora.data.shards.manifest import INDEX, Manifest, Skipped, listed, read_index, read_labels, read_manifest
from explora.data.shards.segmentation import MASK, decode_mask
from explora.data.tars import Sample, samples
from explora.errors import DataError, RunError

OPEN: Final = 256
"""Tar files that a set holds open at a time, at most."""

Made = TypeVar("Made")


class ShardSet:
    """A folder that `pack` wrote: images by number, labels, class names.

    Opening it reads no image and no row of the index, so it costs the same for ten images as for ten million.
    Safe to fork, to pickle and to read from many threads: reads never move a file position, and a pickle holds no rows.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        index: np.ndarray,
        rows: np.ndarray | None = None,
        bits: np.ndarray | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._rows = rows
        self._bits = None if bits is None else bits.view(np.ndarray)
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
            if fault := resized(shards.folder / shard.file, shard.bytes):
                raise DataError(f"{fault}; {shards.manifest.again}")
        return shards

    @classmethod
    def trusted(cls, folder: str | Path) -> ShardSet:
        """Open packed shards without a look at the tar files.

        Raises:
            DataError: the folder is missing, is not packed, or its manifest, index or labels are damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        return cls(folder, manifest, read_index(folder, manifest), bits=read_labels(folder, manifest))

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

    @property
    def multilabel(self) -> bool:
        """Whether images may have several labels each, or none of them."""
        return self._bits is not None

    @property
    def masks(self) -> list[str] | None:
        """Names by number of the classes in segmentation masks, or None for images without."""
        return self.manifest.masks

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 (n,), -1 without one.

        Raises:
            DataError: images may have several, or the index has one that is no class.
        """
        if self.multilabel:
            raise DataError(
                f"{self.folder}: its images may have several labels each, but this needs one label for each; use what "
                "takes several labels"
            )
        return self._numbers("label", len(self.classes or ()))

    @cached_property
    def targets(self) -> np.ndarray:
        """Whether each image is of each class, uint8 (n, C) of 0 and 1; without a label nothing but 0.

        Raises:
            DataError: the index has a label that is no class.
        """
        count = len(self.classes or ())
        if self._bits is not None:
            return np.unpackbits(self._bits, axis=1, count=count, bitorder="little")
        return (self.labels[:, None] == np.arange(count)).view(np.uint8)

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
        bits = None if self._bits is None else self._bits[rows]
        return ShardSet(self.folder, self.manifest, self.index[rows], rows, bits)

    def read(self, index: int) -> bytes:
        """The stored bytes of image `index`, as they were in the packed file.

        Raises:
            DataError: the shard is not the one that was packed.
            RunError: it cannot be read.
        """
        return self._made(index, self._bytes, lambda blob: blob)

    def image(self, index: int, *, least: int | None = None) -> np.ndarray:
        """Image `index`, decoded: (H, W, bands) of the stored type.

        Args:
            least: see `decode`.

        Raises:
            DataError: names the shard, the place in it and the reason.
            RunError: the shard cannot be read.
        """
        return self._made(index, self._bytes, lambda blob: decode(blob, self.pixels, least=least))

    def read_mask(self, number: int) -> bytes:
        """The stored PNG of the mask of image `number`.

        Raises:
            DataError, RunError: see `mask`.
        """
        return self._made(number, self._mask_bytes, lambda blob: blob)

    def mask(self, number: int) -> np.ndarray:
        """The class of each pixel of image `number`, uint8 (H, W), H and W those of the image; 255 for no class.

        Raises:
            DataError: these images have no masks, or this one is damaged.
            RunError: the shard cannot be read.
        """
        return self._made(number, self._mask_bytes, lambda blob: decode_mask(blob, len(self.masks or ())))

    def where(self, index: int) -> str:
        """Shard file, number and name (or else the place) of an image, for messages."""
        try:
            number, offset, _ = self._place(index)
        except DataError:
            return f"{self.folder / INDEX}: image {index}"
        try:
            place = ascii(self._member(number, offset).name)[1:-1]
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

    def _made(self, index: int, read: Callable[[int], bytes], make: Callable[[bytes], Made]) -> Made:
        """What comes of the bytes of an image or its mask; any fault with the place and what mends it."""
        try:
            try:
                blob = read(index)
            except OSError as error:
                # The disk's or the process's fault, not the image's: another one must not stand in for it.
                raise RunError(
                    f"{self.where(index)}: cannot be read: {error.strerror}; run the same command again"
                ) from None
            return make(blob)
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}; {self.manifest.again}") from None

    def _bytes(self, index: int) -> bytes:
        return self._read(*self._place(index))

    def _mask_bytes(self, index: int) -> bytes:
        """The bytes of the mask, which is the next member behind an image."""
        if self.masks is None:
            raise DataError("has no mask, nor have the others of this set")
        number, offset, size = self._place(index)
        start = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + tarfile.BLOCKSIZE
        try:
            image, mask = (self._member(number, place) for place in (offset, start))
        except (ValueError, tarfile.TarError) as error:
            raise DataError(f"its mask is not behind it: {error}") from None
        left = self.manifest.shards[number].bytes - start
        if mask.name != f"{image.name.partition('.')[0]}.{MASK}" or not (mask.isreg() and 0 <= mask.size <= left):
            raise DataError(f"its mask is not behind it, but {mask.name!a} of {mask.size} bytes")
        return self._read(number, start, mask.size)

    def _member(self, number: int, offset: int) -> tarfile.TarInfo:
        """The header of the member whose bytes start at an offset."""
        tar = self._tar(number)
        header = os.pread(tar.descriptor, tarfile.BLOCKSIZE, max(offset - tarfile.BLOCKSIZE, 0))
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")

    def _read(self, number: int, offset: int, size: int) -> bytes:
        tar = self._tar(number)  # held, so that no other thread's read closes it
        blob = os.pread(tar.descriptor, size, offset)
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
        if found := faults(self, workers=workers, progress=progress):
            raise DataError(f"{self.folder}: damaged, {len(found)} fault(s); {self.manifest.again}{listed(found)}")

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
