"""Compares packed shards with what their manifest says: sizes, digests of files, and the digest of each image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from explora.data.shards.crew import Count, Progress, work
from explora.data.shards.manifest import INDEX, LABELS, digest, fingerprint, read_labels
from explora.errors import DataError

if TYPE_CHECKING:
    from explora.data.shards.index import ShardSet

CHUNK: Final = 1 << 20
"""Rows of the index that are looked at together."""


class _Task(NamedTuple):
    """One shard to look at."""

    shards: ShardSet
    number: int
    end: int
    """Number of the first image behind it."""


class _Found(NamedTuple):
    """What is known of a shard."""

    faults: list[str]
    """What is wrong with it."""
    masks: np.ndarray
    """Digests of the masks of its images, (samples,) uint64, of those that were looked at."""


def faults(shards: ShardSet, *, workers: int | None, progress: Progress | None) -> list[str]:
    """All that is not what was packed, after everything was read once.

    Raises:
        RunError: a worker was killed, or a shard cannot be read.
    """
    ends = np.cumsum([shard.samples for shard in shards.manifest.shards])
    tasks = [_Task(shards, number, int(end)) for number, end in enumerate(ends)]
    looked_at = work(_look, tasks, workers, progress=progress, total=len(shards))
    said = [fault for found in looked_at for fault in found.faults]
    if shards.multilabel and _digest(shards.folder / LABELS) != shards.manifest.labels_sha256:
        said.append(f"{shards.folder / LABELS}: not the labels that were packed")
    masks = np.concatenate([found.masks for found in looked_at])
    # What the index does not hold enters the fingerprint, too: damage there is no fault of the index.
    alone = not said or not (shards.multilabel or shards.masks)
    if _digest(shards.folder / INDEX) != shards.manifest.index_sha256 or (alone and _differs(shards, masks)):
        said.append(f"{shards.folder / INDEX}: not the index that was packed")
    return said


def resized(path: Path, expected: int) -> str:
    """What is wrong with the size of a file."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: damaged: {error.strerror}"
    return f"{path}: damaged: {size} bytes, but {expected} were packed" if size != expected else ""


def _differs(shards: ShardSet, masks: np.ndarray) -> bool:
    columns = _columns(shards, masks)
    found = fingerprint(shards.classes, shards.pixels, columns, multilabel=shards.multilabel, masks=shards.masks)
    return found != shards.fingerprint


def _columns(shards: ShardSet, masks: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """What `fingerprint` takes, a chunk after the other."""
    bits = read_labels(shards.folder, shards.manifest)
    for start in range(0, len(shards), CHUNK):
        rows = slice(start, start + CHUNK)
        columns = [shards.index["label"], shards.index["digest"]]
        columns += [] if bits is None else [bits]
        columns += [] if shards.masks is None else [masks]
        yield tuple(column[rows] for column in columns)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _look(task: _Task, count: Count) -> _Found:
    shards = task.shards
    shard = shards.manifest.shards[task.number]
    path = shards.folder / shard.file
    masks = np.zeros(shard.samples, np.uint64)
    if fault := resized(path, shard.bytes):
        return _Found([fault], masks)
    said = []
    if (found := _digest(path)) != shard.sha256:
        if found.startswith("cannot"):
            return _Found([f"{path}: {found}"], masks)
        said.append(f"{path}: its content has changed since it was packed")
    for place, index in enumerate(range(task.end - shard.samples, task.end)):
        row = shards.index[index]
        try:
            if int(row["shard"]) != task.number or digest(shards.read(index)) != int(row["digest"]):
                said.append(f"{shards.where(index)}: not the image that was packed")
            if shards.masks is not None:
                masks[place] = digest(shards.read_mask(index))
        except DataError as error:
            said.append(str(error))
        count(1)
    return _Found(said, masks)
