"""Writes one shard: reads its images from disk, checks and counts them, and appends them to a tar file."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import tifffile
from PIL import Image

from explora.bands import Pixels
from explora.data.decode import MAX_BYTES, decode
from explora.data.shards.crew import Count
from explora.data.shards.listing import EXTENSIONS, RawSample
from explora.data.shards.manifest import ROW, Skipped, digest
from explora.data.shards.parts import Part
from explora.data.shards.segmentation import IGNORE, MASK, decode_mask, storable, unnamed
from explora.data.statistics import Tally
from explora.errors import DataError
from explora.runs import sync

SAMPLES = "samples.jsonl"
"""In the work folder: all images of the listing, one to a line."""
WHOLE = "shards"
"""In the work folder: shards that are finished."""


class Job(NamedTuple):
    """One shard to write."""

    work: Path
    """The work folder."""
    number: int
    """Of the shard."""
    start: int
    """Byte of `SAMPLES` where its first image stands."""
    first: int
    """Number of its first image in the listing."""
    images: int
    """How many images it is to hold."""
    pixels: Pixels
    groups: list[str]
    """Names by group number."""
    classes: int
    """How many labels there may be."""
    masks: int
    """How many classes there may be in masks; 0: there are no masks."""

    @property
    def file(self) -> str:
        """Name of the tar file."""
        return f"shard-{self.number:06d}.tar"

    @property
    def record(self) -> Path:
        """The file that says what the shard holds: where it lies, the shard is finished."""
        return self.work / f"shard-{self.number:06d}.npz"

    def finished(self) -> Part | None:
        """What the shard holds, or None while it has to be written."""
        if not self.record.exists():
            return None
        part = Part.load(self.record)
        path = self.work / WHOLE / part.file
        return part if not part.bytes or (path.exists() and path.stat().st_size == part.bytes) else None


def to_line(sample: RawSample, *state: int) -> bytes:
    """A line of `SAMPLES`; the state, size and time of each file, only tells whether they have changed."""
    facts = (os.path.abspath(sample.path), sample.label, sample.group, sample.recorded, sample.box, sample.fault)
    mask = None if sample.mask is None else os.path.abspath(sample.mask)
    return json.dumps([*facts, mask, *state]).encode() + b"\n"


def _of_line(line: bytes) -> RawSample:
    path, label, group, name, box, fault, mask, *_ = json.loads(line)
    label = tuple(label) if isinstance(label, list) else label
    return RawSample(Path(path), label, group, name, box and tuple(box), fault, mask and Path(mask))


def write_shard(job: Job, count: Count) -> None:
    """Write the tar under another name, rename it when it is on the disk, then leave the record of it."""
    temporary = job.work / f"{job.file}.tmp"
    rows: list[tuple[int, int, int, int, int, int]] = []
    labels: list[int | tuple[int, ...]] = []
    masks: list[int] = []
    skipped: list[Skipped] = []
    tally = Tally(job.pixels)
    try:
        with temporary.open("wb") as file, _plain(file) as tar:
            for number, sample in _samples(job):
                try:
                    suffix, blob, image = _stored(sample, job.pixels)
                    mask = _mask(sample) if job.masks else None
                    tally.add(image)
                except DataError as error:
                    skipped.append(Skipped(path=sample.recorded, reason=str(error)))
                else:
                    others = _members(sample, job.groups)
                    if mask is not None:
                        _check_mask(sample, mask, image, job.masks)
                        masks.append(digest(mask.blob))
                        others = {f".{MASK}": mask.blob, **others}
                    offset = _append(tar, f"{number:09d}", suffix, blob, others)
                    label = sample.label if isinstance(sample.label, int) else -1
                    rows.append((offset, digest(blob), 0, len(blob), label, sample.group))
                    labels.append(sample.label)
                count(1)
        size, sha256 = _publish(temporary, job.work / WHOLE / job.file) if rows else (0, "")
    finally:
        temporary.unlink(missing_ok=True)
    digests = np.array(masks, np.uint64) if masks else None
    part = Part(
        job.file, size, sha256, np.array(rows, ROW), skipped, tally.state(), _bits(labels, job.classes), digests
    )
    part.save(job.record)


def _bits(labels: Sequence[int | tuple[int, ...]], classes: int) -> np.ndarray | None:
    """Rows of `labels.npy`, see `read_labels`; None where images have one label at most."""
    several = [label for label in labels if isinstance(label, tuple)]
    if not several:
        return None
    targets = np.zeros((len(several), classes), np.uint8)
    for target, label in zip(targets, several, strict=True):
        target[list(label)] = 1
    return np.packbits(targets, axis=1, bitorder="little")


def _samples(job: Job) -> Iterator[tuple[int, RawSample]]:
    with (job.work / SAMPLES).open("rb") as file:
        file.seek(job.start)
        for number, line in enumerate(itertools.islice(file, job.images), job.first):
            yield number, _of_line(line)


def _publish(temporary: Path, path: Path) -> tuple[int, str]:
    """Rename a file that is whole; returns its size and digest."""
    sync(temporary)
    with temporary.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    size = temporary.stat().st_size
    temporary.replace(path)
    sync(path.parent)
    return size, sha256


def _stored(sample: RawSample, pixels: Pixels) -> tuple[str, bytes, np.ndarray]:
    """Ending and bytes to store for an image, and what they decode to.

    Raises:
        DataError: the image cannot be read, or is not what the pixels say, or the recipe knew that it cannot be packed.
    """
    if sample.fault:
        raise DataError(sample.fault)
    suffix = sample.path.suffix.lower()
    if suffix not in EXTENSIONS:
        raise DataError(f"'{suffix}' is none of {', '.join(sorted(EXTENSIONS))}")
    blob = _read(sample.path)
    image = decode(blob, pixels)
    if sample.box is None:
        return suffix, blob, image
    part = cut(image, sample.box)
    suffix, blob = encode(part, jpeg=blob.startswith(b"\xff\xd8"))
    return suffix, blob, decode(blob, pixels) if suffix == ".jpg" else part


class _Mask(NamedTuple):
    """A mask to store."""

    blob: bytes
    """As it is stored."""
    numbers: np.ndarray
    """uint8 (H, W)."""


def _mask(sample: RawSample) -> _Mask:
    """The mask of an image.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    if sample.mask is None:
        raise DataError("has no mask, as the other images have")
    try:
        blob = _read(sample.mask)
        numbers = decode_mask(blob)
    except DataError as error:
        raise DataError(f"its mask {sample.mask.name}: {error}") from None
    return _Mask(storable(blob, numbers), numbers)


def _check_mask(sample: RawSample, mask: _Mask, image: np.ndarray, classes: int) -> None:
    """Refuse a mask of another image, or of other classes: that is no damage to be borne, but a mistake in all of them.

    Raises:
        DataError: names the mask.
    """
    (height, width), (high, wide) = mask.numbers.shape, image.shape[:2]
    if (height, width) != (high, wide):
        raise DataError(
            f"{sample.mask}: {width} x {height} pixels, but its image {sample.path} has {wide} x {high}; a mask must "
            "be of the size of its image"
        )
    if strange := unnamed(mask.numbers, classes):
        raise DataError(
            f"{sample.mask}: holds class {strange[0]}, but there are {classes} names of classes; name all of them, or "
            f"give pixels of no class the number {IGNORE}"
        )


def _read(path: Path) -> bytes:
    try:
        known = path.stat()
        # Reading from a pipe or a device would never end.
        if not stat.S_ISREG(known.st_mode):
            raise DataError("not a file")
        if known.st_size > MAX_BYTES:
            raise DataError(f"a file of {known.st_size} bytes is above the bound of {MAX_BYTES}; cut it into tiles")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        # DataError is a ValueError too, and already says what is wrong; the other is a name that no file can have.
        raise error if isinstance(error, DataError) else DataError(f"cannot be read: {error}") from None


def cut(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """The part of an image (H, W, bands) in a box of left, top, width and height, as far as it lies inside.

    Raises:
        DataError: nothing of it does.
    """
    left, top, width, height = box
    part = image[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if not part.size:
        raise DataError(
            f"the box of {width} x {height} pixels at {left}, {top} is empty or lies outside of the image "
            f"of {image.shape[1]} x {image.shape[0]}"
        )
    return np.ascontiguousarray(part)


def encode(image: np.ndarray, *, jpeg: bool) -> tuple[str, bytes]:
    """Ending and bytes of a cut image (H, W, bands): three 8-bit bands as PNG, or as JPEG of quality 95 with whole
    chroma where they came from one; anything else as TIFF with deflate."""
    if image.dtype != np.uint8 or image.shape[2] != 3:
        file = io.BytesIO()
        tifffile.imwrite(
            file, image, photometric="minisblack", planarconfig="contig", compression="deflate", metadata=None
        )
        return ".tif", file.getvalue()
    file = io.BytesIO()
    if jpeg:
        # By Pillow even beside simplejpeg, which at this quality takes a coarser transform.
        Image.fromarray(image).save(file, "JPEG", quality=95, subsampling=0)
        return ".jpg", file.getvalue()
    Image.fromarray(image).save(file, "PNG")
    return ".png", file.getvalue()


def _members(sample: RawSample, groups: list[str]) -> dict[str, bytes]:
    """What stands beside an image, by ending."""
    facts: dict[str, object] = {"path": sample.recorded}
    if sample.group >= 0:
        facts["group"] = groups[sample.group]
    if sample.box is not None:
        facts["box"] = sample.box
    if isinstance(sample.label, tuple):
        facts["labels"] = sorted(set(sample.label))
        return {".json": json.dumps(facts).encode()}
    label = {".cls": str(sample.label).encode()} if sample.label >= 0 else {}
    return {**label, ".json": json.dumps(facts).encode()}


def _plain(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def _append(tar: tarfile.TarFile, key: str, suffix: str, blob: bytes, others: dict[str, bytes]) -> int:
    """Append an image and what belongs to it; returns where its bytes start."""
    # Our names are short, so the USTAR header is always one block.
    start = tar.offset + tarfile.BLOCKSIZE
    for ending, content in {suffix: blob, **others}.items():
        # A fresh TarInfo has owner 0 and time 0.
        info = tarfile.TarInfo(key + ending)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return start
