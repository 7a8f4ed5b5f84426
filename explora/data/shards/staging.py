"""Node-local staging: packed shards copied once to a fast disk of this node, every byte checked on the way.

A copy is a folder of its own, `explora-<fingerprint>-<layout>`, that any later job on the node finds again. Its
manifest is written last: a folder without one is unfinished, and whoever comes next goes on with it. Nothing is ever
removed; clear old copies out of the scratch folder as you would anything else there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from explora.data.shards.crew import locked
from explora.data.shards.manifest import (
    INDEX,
    LABELS,
    MANIFEST,
    Manifest,
    ShardFile,
    read_index,
    read_labels,
    read_manifest,
    write_manifest,
)
from explora.errors import DataError
from explora.runs import sync

logger = logging.getLogger("explora")

_CHUNK = 8 * 2**20
_LOCK = ".lock"
_POLL = 0.2
_REMIND = 30.0
"""Seconds between two lines that say what a process is waiting for."""


def stage(folder: str | Path, scratch: str | Path, progress: Callable[[int], None] | None = None) -> Path:
    """Copy packed shards into `scratch`, unless this node has them, and return the folder to open.

    Any number of processes may ask at once: the first copies, the others wait. A copy that was cut short is continued;
    where the source has got other statistics or groups since, manifest and index alone are copied again.

    Args:
        folder: what `explora pack` wrote.
        scratch: an existing folder on a disk of this node.
        progress: called with the bytes of shards that are copied so far.

    Raises:
        DataError: the shards cannot be read or are not what was packed, or the scratch folder is missing, cannot be
            written or is too small.
    """
    folder, scratch = Path(folder), Path(scratch)
    manifest = read_manifest(folder)
    if not scratch.is_dir():
        raise DataError(f"{scratch}: no such folder; scratch must be a folder on a disk of this node, already there")
    place = scratch / f"explora-{manifest.fingerprint[:16]}-{_layout(manifest)[:8]}"
    try:
        place.mkdir(exist_ok=True)
        with _alone(place / _LOCK):
            if not _finished(place, manifest):
                _complete(folder, place, manifest, progress)
    except OSError as error:
        raise DataError(
            f"{place}: cannot be written: {error.strerror}; make room or choose another scratch folder"
        ) from None
    return place


def _layout(manifest: Manifest) -> str:
    """Digest of how the images are cut into files, which the fingerprint leaves open."""
    return hashlib.sha256("".join(f"{shard.file}/{shard.sha256}/" for shard in manifest.shards).encode()).hexdigest()


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Be the only process on this node that holds `lock`, after whoever has it now; the end of a process frees it."""
    with lock.open("ab") as file:
        started = said = time.monotonic()
        while not locked(file):
            if said == started or time.monotonic() - said > _REMIND:
                said = time.monotonic()
                logger.info("%s: waiting for the process that copies (%.0f s)", lock.parent, said - started)
            time.sleep(_POLL)
        yield


def _finished(place: Path, manifest: Manifest) -> bool:
    """Whether a whole copy of exactly this is there, without reading it."""
    if not (place / MANIFEST).exists():
        return False
    try:
        read_index(place, manifest)
        read_labels(place, manifest)
        same = read_manifest(place) == manifest
    except DataError:
        return False
    return same and all(_sized(place, shard) for shard in manifest.shards)


def _sized(place: Path, shard: ShardFile) -> bool:
    path = place / shard.file
    return path.exists() and path.stat().st_size == shard.bytes


def _complete(folder: Path, place: Path, manifest: Manifest, progress: Callable[[int], None] | None) -> None:
    """Copy all that is not there; the manifest, the sign that it is, comes last."""
    checked = (place / MANIFEST).exists()  # what an unfinished copy holds is read again
    missing = [
        shard
        for shard in manifest.shards
        if not _sized(place, shard) or not (checked or _digest(place / shard.file) == shard.sha256)
    ]
    if missing:
        (place / MANIFEST).unlink(missing_ok=True)
    for leftover in place.glob(".*.partial"):
        leftover.unlink()
    _check_room(folder, place, missing)
    started, done = time.monotonic(), 0
    for shard in missing:
        for count in _copied(folder, place, manifest, shard.file, shard.sha256):
            done += count
            if progress:
                progress(done)
    list(_copied(folder, place, manifest, INDEX, manifest.index_sha256))
    if manifest.labels_sha256 is not None:
        list(_copied(folder, place, manifest, LABELS, manifest.labels_sha256))
    write_manifest(place, manifest)
    sync(place)
    logger.info("%s: %s copied from %s in %.1f s", place, _mib(done), folder, time.monotonic() - started)


def _check_room(folder: Path, place: Path, missing: list[ShardFile]) -> None:
    need, free = sum(shard.bytes for shard in missing), shutil.disk_usage(place).free
    if need > free:
        raise DataError(
            f"{place.parent}: {folder} needs {_mib(need)} more there, but {_mib(free)} are free; "
            "make room, choose another scratch folder, or leave scratch out"
        )
    if missing:
        logger.info("%s: copying %d files of %s, %s", place, len(missing), folder, _mib(need))


def _copied(folder: Path, place: Path, manifest: Manifest, name: str, sha256: str) -> Iterator[int]:
    """Copy one file, all or nothing, telling the bytes of each piece.

    Raises:
        DataError: it cannot be read, or has another digest.
        OSError: it cannot be written.
    """
    temporary, whole = place / f".{name}.partial", hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            for chunk in _chunks(folder / name):
                file.write(chunk)
                whole.update(chunk)
                yield len(chunk)
            file.flush()
            os.fsync(file.fileno())
        if sha256 != whole.hexdigest():
            raise DataError(f"{folder / name}: damaged: its content is not what the manifest says; {manifest.again}")
        temporary.replace(place / name)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
