"""What is known of one tar file, and how many of them become a set of shards: `index.npy`, then `manifest.json`."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np

from explora.bands import Pixels
from explora.data.shards.index import ShardSet, among, overlap
from explora.data.shards.listing import Listing
from explora.data.shards.manifest import (
    INDEX,
    LABELS,
    SHOWN,
    Manifest,
    ShardFile,
    Skipped,
    fingerprint,
    write_manifest,
)
from explora.data.statistics import Tally
from explora.errors import DataError

LISTED: Final = 10_000
"""Images left out that a manifest names; one more entry says how many others there are."""
_FEW: Final = 3
"""Images that a line of the log names."""

logger = logging.getLogger("explora")


@dataclass(frozen=True)
class Part:
    """One tar file."""

    file: str
    """Its name."""
    bytes: int
    """Its size, 0 where no image was usable and so no file was written."""
    sha256: str
    """Digest of the whole file."""
    rows: np.ndarray
    """Its images, (n,) of `ROW`; the number of the shard is filled in by `bind`."""
    skipped: list[Skipped]
    """Images that were left out."""
    tally: dict[str, np.ndarray]
    """State of the `Tally` of its images."""
    labels: np.ndarray | None = None
    """Their rows of `labels.npy`, where they may have several labels each."""
    masks: np.ndarray | None = None
    """Digests of their masks, (n,) uint64, where they have some."""

    def save(self, path: Path) -> None:
        """Write all of it, whole or not at all."""
        facts = {
            "file": self.file,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "skipped": [[item.path, item.reason] for item in self.skipped],
        }
        blob = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        tally = {f"tally.{name}": array for name, array in self.tally.items()}
        beside = {"labels": self.labels, "masks": self.masks}
        there = {name: array for name, array in beside.items() if array is not None}
        with replacing(path) as file:
            np.savez_compressed(file, allow_pickle=False, facts=blob, rows=self.rows, **there, **tally)

    @classmethod
    def load(cls, path: Path) -> Part:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            tally = {name.removeprefix("tally."): arrays[name] for name in arrays if name.startswith("tally.")}
            skipped = [Skipped(path=name, reason=reason) for name, reason in facts.pop("skipped")]
            there = {name: arrays[name] for name in ("labels", "masks") if name in arrays}
            return cls(rows=arrays["rows"], skipped=skipped, tally=tally, **there, **facts)


def bind(
    folder: Path,
    parts: Iterable[Part],
    listing: Listing,
    name: str,
    against: Sequence[ShardSet] = (),
) -> None:
    """Make a set of the tars in a folder: the manifest comes last, so without it there is no set.

    Args:
        listing: what the images mean; its samples are not looked at.

    Raises:
        DataError: there is no image in any of them.
        OSError: the folder cannot be written.
    """
    whole = _Whole(listing.pixels)
    for part in parts:
        whole.add(part)
    if not whole.tables:
        shown = "".join(f"\n  {item.path}: {item.reason}" for item in whole.skipped[:3])
        raise DataError(f"nothing to pack: {whole.missing} images found, none usable{shown}")
    columns = zip(whole.tables, *filter(None, (whole.labels, whole.masks)), strict=True)
    labelled = ((table["label"], table["digest"], *others) for table, *others in columns)
    digests = np.concatenate([table["digest"] for table in whole.tables])
    manifest = Manifest(
        name=name,
        samples=len(digests),
        bytes=sum(shard.bytes for shard in whole.shards),
        classes=listing.classes,
        groups=listing.groups,
        masks=listing.masks,
        pixels=with_statistics(listing.pixels, whole.tally),
        shards=whole.shards,
        fingerprint=fingerprint(
            listing.classes, listing.pixels, labelled, multilabel=bool(whole.labels), masks=listing.masks
        ),
        index_sha256=_write_array(folder / INDEX, whole.tables),
        labels_sha256=_write_array(folder / LABELS, whole.labels) if whole.labels else None,
        skipped=whole.skipped,
        left_out=whole.missing,
        duplicates=len(digests) - len(np.unique(digests)),
        overlaps={
            called: int(among(digests, other.index["digest"]).sum()) for called, other in _told_apart(against).items()
        },
    )
    write_manifest(folder, manifest)


class _Whole:
    """All parts together, added in their order, because sums of floats hang on it."""

    def __init__(self, pixels: Pixels) -> None:
        self.shards: list[ShardFile] = []
        self.tables: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []
        self.skipped: list[Skipped] = []
        self.missing = 0
        self.tally = Tally(pixels)

    def add(self, part: Part) -> None:
        self.missing += len(part.skipped)
        self.skipped += part.skipped[: LISTED - len(self.skipped)]
        if len(part.rows):
            part.rows["shard"] = len(self.shards)
            shard = ShardFile(file=part.file, samples=len(part.rows), bytes=part.bytes, sha256=part.sha256)
            self.shards.append(shard)
            self.tables.append(part.rows)
            self.labels += [] if part.labels is None else [part.labels]
            self.masks += [] if part.masks is None else [part.masks]
            self.tally.merge(Tally.of_state(self.tally.pixels, part.tally))


def with_statistics(pixels: Pixels, tally: Tally) -> Pixels:
    """The same bands, with the statistics of all images that were counted."""
    bands = zip(pixels.bands, tally.statistics(), strict=True)
    return pixels.model_copy(
        update={"bands": tuple(band.model_copy(update={"statistics": found}) for band, found in bands)}
    )


def _told_apart(sets: Sequence[ShardSet]) -> dict[str, ShardSet]:
    """Sets by their names, with their folders where one name is not enough."""
    names = [one.name for one in sets]
    return {one.name if names.count(one.name) == 1 else f"{one.name} ({one.folder})": one for one in sets}


def announce(shards: ShardSet, against: Sequence[ShardSet] = ()) -> None:
    """Log what came of it: what was left out, and what is in other sets, too."""
    missing = shards.manifest.left_out
    for skipped in shards.skipped[:SHOWN]:
        logger.warning("skipped %s: %s", skipped.path, skipped.reason)
    if missing > SHOWN:
        logger.warning("... and %d more; the manifest says why", missing - SHOWN)
    for called, other in _told_apart(against).items():
        if shards.manifest.overlaps[called]:
            are, names = _some(shards, overlap(shards, other))
            logger.warning("%s also in %s (%s): %s", are, other.folder, other.name, names)
    if shards.manifest.duplicates:
        are, names = _some(shards, _repeated(shards.index["digest"]))
        logger.warning("%s in this set already, byte for byte: %s", are, names)
    logger.info(
        "%s: %d images in %d shard(s), %s, %d skipped",
        *(shards.folder, len(shards), len(shards.manifest.shards)),
        _meant(shards),
        missing,
    )


def _meant(shards: ShardSet) -> str:
    """What is known of the images."""
    several = ", several to an image" if shards.multilabel else ""
    labels = f"{len(shards.classes)} classes{several}" if shards.classes else "no labels"
    return labels if shards.masks is None else f"{labels}, masks of {len(shards.masks)} classes"


def _some(shards: ShardSet, images: np.ndarray) -> tuple[str, str]:
    """How many images there are, and what the first few were called."""
    names = ", ".join(shards.source(int(index)) for index in images[:_FEW])
    are = "1 image is" if len(images) == 1 else f"{len(images)} images are"
    return are, names + ", ..." * (len(images) > _FEW)


def _repeated(digests: np.ndarray) -> np.ndarray:
    """Numbers of the images whose digest an earlier one has."""
    first = np.zeros(len(digests), bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return np.flatnonzero(~first)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` once it is whole and on the disk.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_array(path: Path, tables: list[np.ndarray]) -> str:
    """As `numpy.save` of all tables together, without a second copy of them in memory; returns the file's sha256."""
    header, shape = io.BytesIO(), (sum(map(len, tables)), *tables[0].shape[1:])
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(tables[0].dtype), "fortran_order": False, "shape": shape}
    )
    whole = hashlib.sha256()
    with replacing(path) as file:
        for block in (header.getbuffer(), *(np.ascontiguousarray(table).data for table in tables)):
            file.write(block)
            whole.update(block)
    return whole.hexdigest()
