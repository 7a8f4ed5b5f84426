"""Writes images into tar shards, all or nothing; every image is decoded once as a check."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from explora.data.decode import decode
from explora.data.index import ShardSet
from explora.data.listing import EXTENSIONS, Listing, RawSample
from explora.data.manifest import INDEX, ROW, Manifest, ShardFile, Skipped, digest, fingerprint, write_manifest
from explora.errors import DataError
from explora.runs import sync

SHARD_MB = 256
"""Size of a shard in MiB, unless one is asked for."""


def pack(
    listing: Listing,
    out: str | Path,
    *,
    name: str,
    shard_bytes: int = SHARD_MB * 2**20,
    progress: Callable[[int], None] | None = None,
) -> ShardSet:
    """Write plain WebDataset tars, `index.npy` and `manifest.json` into the new folder `out`.

    Original bytes are kept. Images that do not decode are left out and listed as `skipped`. The same input
    gives the same bytes. `progress` is called with the number of images seen so far.

    Raises:
        DataError: `out` exists, no image is usable, a label has no class, or the disk is full.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out}: already exists; remove it or choose another folder")
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        with closing(_Writer(partial, shard_bytes)) as writer:
            skipped = _write(listing.samples, writer, len(listing.classes or ()), progress)
            writer.finish(name, listing, skipped)
        os.rename(partial, out)
        sync(out.parent)
    except OSError as error:
        raise _unwritable(out, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ShardSet.open(out)


def _write(
    samples: Iterable[RawSample], writer: _Writer, classes: int, progress: Callable[[int], None] | None
) -> list[Skipped]:
    skipped = []
    for seen, sample in enumerate(samples, 1):
        if not -1 <= sample.label < classes:
            raise DataError(f"{sample.path}: label {sample.label}, but there are {classes} class names")
        try:
            blob = _checked(sample.path)
        except DataError as error:
            skipped.append(Skipped(path=sample.recorded, reason=str(error)))
        else:
            writer.add(sample, blob)
        if progress:
            progress(seen)
    if not writer.count:
        shown = "".join(f"\n  {item.path}: {item.reason}" for item in skipped[:3])
        raise DataError(f"nothing to pack: {len(skipped)} images found, none usable{shown}")
    return skipped


def _checked(path: Path) -> bytes:
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(f"'{path.suffix}' is none of {', '.join(sorted(EXTENSIONS))}")
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    decode(blob)
    return blob


class _Writer:
    """Appends samples to the current tar and starts the next one when it is full."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.count = 0
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._shards: list[ShardFile] = []
        self._tables: list[np.ndarray] = []
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._tar: tarfile.TarFile | None = None

    def add(self, sample: RawSample, blob: bytes) -> None:
        if self._tar is not None and self._tar.offset + len(blob) > self._shard_bytes:
            self._close()
        if self._tar is None:
            self._tar = tarfile.open(self._shard_path(), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        key = f"{self.count:09d}"
        offset = _member(self._tar, key + sample.path.suffix.lower(), blob)
        if sample.label >= 0:
            _member(self._tar, f"{key}.cls", str(sample.label).encode())
        _member(self._tar, f"{key}.json", json.dumps({"path": sample.recorded}).encode())
        self._rows.append((offset, digest(blob), len(self._shards), len(blob), sample.label, sample.group))
        self.count += 1

    def finish(self, name: str, listing: Listing, skipped: list[Skipped]) -> None:
        self._close()
        index = self._folder / INDEX
        rows = np.concatenate(self._tables)
        np.save(index, rows)
        sync(index)
        manifest = Manifest(
            name=name,
            samples=self.count,
            bytes=sum(shard.bytes for shard in self._shards),
            classes=listing.classes,
            groups=listing.groups,
            pixels=listing.pixels,
            shards=self._shards,
            fingerprint=fingerprint(listing.classes, listing.pixels, [(rows["label"], rows["digest"])]),
            skipped=skipped,
        )
        write_manifest(self._folder, manifest)
        sync(self._folder)

    def _shard_path(self) -> Path:
        return self._folder / f"shard-{len(self._shards):06d}.tar"

    def close(self) -> None:
        """Let go of the open tar, whole or not."""
        if self._tar is not None:
            self._tar.fileobj.close()
            self._tar = None

    def _close(self) -> None:
        if self._tar is None:
            return
        path = self._shard_path()
        self._tar.close()
        self._tar = None
        sync(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shard = ShardFile(file=path.name, samples=len(self._rows), bytes=path.stat().st_size, sha256=digest)
        self._shards.append(shard)
        self._tables.append(np.array(self._rows, dtype=ROW))
        self._rows = []


def _member(tar: tarfile.TarFile, name: str, blob: bytes) -> int:
    """Append one file; returns where its bytes start. A fresh TarInfo has owner 0 and time 0."""
    info = tarfile.TarInfo(name)
    info.size = len(blob)
    # Our names are short, so the USTAR header is always one block.
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(blob))
    return start


def _unwritable(out: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{out}: no free space is left on this disk; make room or choose another folder")
    return DataError(f"{out}: cannot be written: {error}")
