"""Packs a listing into shards: on many processes, all or nothing, and on from where a kill came."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from explora.data.shards.crew import Progress, locked, work
from explora.data.shards.index import ShardSet
from explora.data.shards.listing import Listing, RawSample
from explora.data.shards.manifest import MASK_CLASSES
from explora.data.shards.parts import Part, announce, bind, replacing
from explora.data.shards.writer import SAMPLES, WHOLE, Job, to_line, write_shard
from explora.errors import DataError
from explora.runs import sync

SHARD_MB: Final = 256
"""Size of a shard in MiB, unless one is asked for."""
PLAN: Final = "plan.json"
"""In the work folder: what its shards were written from."""
LAYOUT: Final = 1
"""Raised when shards are written in another way, so that no set is made of both."""
LISTED_EVERY: Final = 10_000
"""Images of the listing between two reports on how many there are so far."""

logger = logging.getLogger("explora")


class Span(NamedTuple):
    """The images of one shard."""

    start: int
    """Byte of the samples' file where the first one stands."""
    first: int
    """Its number in the listing."""
    images: int
    """How many there are."""


def pack(
    listing: Listing,
    out: str | Path,
    *,
    name: str,
    shard_bytes: int = SHARD_MB * 2**20,
    workers: int | None = 0,
    against: Sequence[ShardSet] = (),
    progress: Progress | None = None,
) -> ShardSet:
    """Write plain WebDataset tars, `index.npy` and `manifest.json` into the new folder `out`.

    Original bytes are kept, but for parts that are cut out of images. Images that do not decode, or whose masks do
    not, are left out and listed as `skipped`. Which image goes into which shard is settled by the sizes of the files,
    so the same input gives the same bytes, on any number of workers. Until all is done the work is in
    `.{out}.partial` beside `out`; with the same input and settings it goes on from the shards that are whole there.

    Args:
        shard_bytes: size of a shard, which only a single image may exceed; a part that is cut out counts as its file.
        workers: processes; 0 works in this one, None takes as many as there are cores for this process.
        against: sets that should have no image in common with this one; what they have is counted and logged.

    Raises:
        DataError: `out` exists, or is being packed; a leftover of another packing is in the way; no image is usable; a
            label has no class, or some images alone may have several; a mask is not of the size of its image, or holds
            a class without a name; the disk is full.
        RunError: a worker was killed.
    """
    out = Path(out)
    folder = out.with_name(f".{out.name}.partial")
    try:
        _refuse(out)
        (folder / WHOLE).mkdir(parents=True, exist_ok=True)
        with _held(folder, out), _kept_if_worth_it(folder):
            _refuse(out)
            jobs = _jobs(listing, folder, name, shard_bytes, progress)
            _write(jobs, workers, progress)
            bind(folder / WHOLE, (Part.load(job.record) for job in jobs), listing, name, against)
            sync(folder / WHOLE)
            os.rename(folder / WHOLE, out)
            sync(out.parent)
    except OSError as error:
        raise _unwritable(out, error) from None
    shards = ShardSet.open(out)
    announce(shards, against)
    return shards


def _write(jobs: list[Job], workers: int | None, progress: Progress | None) -> None:
    images = sum(job.images for job in jobs)
    left = [job for job in jobs if job.finished() is None]
    if done := images - sum(job.images for job in left):
        logger.info("going on after %d of %d images", done, images)
    work(write_shard, left, workers, progress=progress, total=images, done=done)


def _refuse(out: Path) -> None:
    if out.exists():
        raise DataError(f"{out}: already exists; remove it or choose another folder")


@contextmanager
def _held(folder: Path, out: Path) -> Iterator[None]:
    """Hold the work folder against another process.

    Raises:
        DataError: it has it.
    """
    with (folder / ".lock").open("ab+") as file:
        try:
            if not locked(file):
                file.seek(0)
                holder = file.read().decode() or "unknown"
                raise DataError(f"{out}: another process is packing into it ({holder}); wait for it")
        except OSError:
            logger.warning("%s: this file system has no locks; make sure that nothing else packs here", folder)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(folder / ".lock")):
            raise DataError(f"{out}: another process has just ended packing into it; run the same command again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        file.flush()
        yield


@contextmanager
def _kept_if_worth_it(folder: Path) -> Iterator[None]:
    """Remove the work folder, unless the work was stopped with a shard to go on from."""
    try:
        yield
    finally:
        if whole := len(list((folder / WHOLE).glob("*.tar"))):
            _sweep(folder)
            logger.warning("%d finished shard(s) are kept in %s: the same command goes on from them", whole, folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what was being written when a process ended."""
    for torn in folder.rglob("*.tmp"):
        torn.unlink()


def _jobs(listing: Listing, folder: Path, name: str, shard_bytes: int, progress: Progress | None) -> list[Job]:
    """The shards to write, compared with those that an earlier packing was to write.

    Raises:
        DataError: they differ, a label has no class, a group no name, some images alone may have several labels, masks
            have no or too many names of classes, or there are no images.
    """
    if listing.masks is not None and not 0 < len(listing.masks) <= MASK_CLASSES:
        raise DataError(f"{len(listing.masks)} names of classes in masks; there must be 1 to {MASK_CLASSES}")
    _sweep(folder)
    listed = folder / f"{SAMPLES}.new"
    digest, spans = _list(listing, listed, shard_bytes, progress)
    if not spans:
        raise DataError("nothing to pack: 0 images found, none usable")
    groups = listing.groups.names if listing.groups else []
    plan = {
        "layout": LAYOUT,
        "name": name,
        "shard_bytes": shard_bytes,
        "classes": listing.classes,
        "groups": listing.groups.model_dump(mode="json") if listing.groups else None,
        "masks": listing.masks,
        "pixels": listing.pixels.model_dump(mode="json"),
        "images": digest,
    }
    _compare(folder, plan)
    listed.replace(folder / SAMPLES)
    with replacing(folder / PLAN) as file:
        file.write(json.dumps(plan).encode())
    classes, masks = len(listing.classes or ()), len(listing.masks or ())
    return [Job(folder, number, *span, listing.pixels, groups, classes, masks) for number, span in enumerate(spans)]


def _compare(folder: Path, plan: dict[str, Any]) -> None:
    if not (folder / PLAN).exists() or not any((folder / WHOLE).glob("*.tar")):
        for record in folder.glob("*.npz"):
            record.unlink()
        return
    before = json.loads((folder / PLAN).read_bytes())
    if other := [key for key in plan if plan[key] != before.get(key)]:
        raise DataError(
            f"{folder}: holds what is left of another packing; it differs in {', '.join(other)}. Give the same images "
            f"and settings to go on with it, or remove it to start anew"
        )


def _list(listing: Listing, path: Path, shard_bytes: int, progress: Progress | None) -> tuple[str, list[Span]]:
    """Write all samples to a file, so that no process has to hold them; returns its digest and the shards' spans."""
    whole = hashlib.sha256()
    spans: list[Span] = []
    start = room = position = 0
    first = number = 0
    several: bool | None = None
    with path.open("wb") as file:
        for number, sample in enumerate(listing.samples):
            several = isinstance(sample.label, tuple) if several is None else several
            _check(sample, listing, several)
            state = [*_state(sample.path), *(() if sample.mask is None else _state(sample.mask))]
            weight = _weight(*state[::2])
            if weight > room:
                if number:
                    spans.append(Span(start, first, number - first))
                start, first, room = position, number, shard_bytes
            room -= weight
            line = to_line(sample, *state)
            whole.update(line)
            position += file.write(line)
            if progress and number % LISTED_EVERY == LISTED_EVERY - 1:
                progress(0, number + 1)
    if position:
        spans.append(Span(start, first, number + 1 - first))
    return whole.hexdigest(), spans


def _check(sample: RawSample, listing: Listing, several: bool) -> None:
    classes, groups = len(listing.classes or ()), len(listing.groups.names if listing.groups else ())
    labels = sample.label if isinstance(sample.label, tuple) else (sample.label,)
    if isinstance(sample.label, tuple) != several:
        before = "a tuple of labels" if several else "one label"
        raise DataError(f"{sample.path}: label {sample.label}, but the images before it have {before}; mix them not")
    for label in labels:
        if not (0 if several else -1) <= label < classes:
            raise DataError(f"{sample.path}: label {label}, but there are {classes} class names")
    if several and not classes:
        raise DataError(f"{sample.path}: may have several labels, but there are no class names")
    if sample.mask is not None and (listing.masks is None or sample.box is not None):
        lack = "the classes in masks have no names" if listing.masks is None else "a mask is not cut along with a box"
        raise DataError(f"{sample.path}: has a mask, but {lack}")
    if not -1 <= sample.group < groups:
        raise DataError(f"{sample.path}: group {sample.group}, but there are {groups} group names")


def _state(path: Path) -> tuple[int, int]:
    """Size and time of change in nanoseconds, -1 for a file that is not there."""
    try:
        known = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return known.st_size, known.st_mtime_ns


def _weight(*sizes: int) -> int:
    """Bytes of a sample in a tar: the image and perhaps a mask with their headers, a label and a few facts."""
    return sum(-(-max(size, 0) // tarfile.BLOCKSIZE) + 1 for size in sizes) * tarfile.BLOCKSIZE + 4 * tarfile.BLOCKSIZE


def _unwritable(out: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{out}: no free space is left on this disk; make room or choose another folder")
    return DataError(f"{out}: cannot be written: {error}")
