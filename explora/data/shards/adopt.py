"""Adopts other people's WebDataset tars where they lie: reads them once, and adds only an index and a manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from explora.bands import PHOTOGRAPH, Pixels
from explora.data.decode import decode
from explora.data.shards.crew import Count, Progress, locked, work
from explora.data.shards.index import ShardSet
from explora.data.shards.listing import Listing
from explora.data.shards.manifest import INDEX, MANIFEST, ROW, Skipped, digest, listed
from explora.data.shards.parts import Part, announce, bind
from explora.data.statistics import Tally
from explora.data.tars import Sample, samples, text
from explora.errors import DataError, RunError
from explora.runs import sync

CLASSES: Final = "classes.txt"
"""In the folder: one class name to a line, in the order of the labels."""
MAX_CLASSES: Final = 1_000_000


class _Task(NamedTuple):
    """One tar to read."""

    path: Path
    pixels: Pixels
    classes: int
    """How many labels there may be."""


def adopt(
    folder: str | Path,
    *,
    name: str,
    classes: Sequence[str] | None = None,
    pixels: Pixels = PHOTOGRAPH,
    workers: int | None = 0,
    progress: Progress | None = None,
) -> ShardSet:
    """Make a set of shards of a folder of WebDataset tars, which are not changed: adds `index.npy` and `manifest.json`.

    Samples are told apart as webdataset does it: members side by side whose paths are the same up to the first dot of
    the file name. Each must have one image; its label is the number in its `.cls`, or in `label` or `cls` of its
    `.json`. What cannot be read is listed as `skipped`. Names inside the tars are only compared, never used as paths.

    Args:
        classes: names by label; None takes the lines of `classes.txt` in the folder, or else the numbers themselves.
        pixels: what the stored values mean; all images must fit.
        workers: processes; 0 works in this one, None takes as many as there are cores for this process.
        progress: its second number is 0, because nobody knows how many images there are.

    Raises:
        DataError: there are no tars, or an index already; a tar is compressed, cut off or no tar at all; a label has no
            class; no image is usable; the folder cannot be written.
        RunError: a worker was killed.
    """
    folder = Path(folder)
    paths = _tars(folder)
    with _held(folder):
        names = list(classes) if classes is not None else _classes_beside(folder)
        tasks = [_Task(path, pixels, MAX_CLASSES if names is None else len(names)) for path in paths]
        found = work(_read, tasks, workers, progress=progress)
        parts = [one for one in found if isinstance(one, Part)]
        if faults := [one for one in found if isinstance(one, DataError)]:
            raise DataError(f"{folder}: {len(faults)} fault(s){listed(faults)}")
        if not any(len(part.rows) for part in parts):
            shown = "".join(f"\n  {item.path}: {item.reason}" for part in parts for item in part.skipped[:1])
            raise DataError(f"{folder}: no image in {len(paths)} tar(s) is usable{shown[:2000]}")
        if names is None:
            last = max(int(part.rows["label"].max(initial=-1)) for part in parts)
            names = [str(label) for label in range(last + 1)] or None
        _bind(folder, parts, Listing(names, (), pixels), name)
    shards = ShardSet.open(folder)
    announce(shards)
    return shards


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder against another process that indexes it.

    Raises:
        DataError: one does, or has just done so; the folder cannot be written.
    """
    lock = folder / ".index.lock"
    try:
        file = lock.open("ab")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror}") from None
    with file:
        if not locked(file) or (folder / MANIFEST).exists():
            raise DataError(f"{folder}: another process indexes these tars, or has done so")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _bind(folder: Path, parts: list[Part], listing: Listing, name: str) -> None:
    try:
        bind(folder, parts, listing, name)
        sync(folder)
    except (OSError, RunError) as error:
        (folder / INDEX).unlink(missing_ok=True)
        raise DataError(f"{folder}: {INDEX} and {MANIFEST} cannot be written: {error}") from None


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    for name in (MANIFEST, INDEX):
        if (folder / name).exists():
            raise DataError(f"{folder}: holds {name} already; remove it to index the tars again")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    packed = [path.name for path in files if re.search(r"\.(tgz|tar\.\w+)$", path.name)]
    if packed:
        raise DataError(
            f"{folder}: {packed[0]} is compressed, so no image in it can be reached alone; unpack it to a .tar"
        )
    tars = [path for path in files if path.suffix == ".tar"]
    if not tars:
        raise DataError(f"{folder}: no .tar files")
    for path in tars:
        if not path.name.isprintable() or "\\" in path.name:
            raise DataError(f"{folder}: {text(path.name)} is no name that a manifest can hold; rename the file")
    return tars


def class_names(path: Path) -> list[str]:
    """The lines of a text file, without empty ones.

    Raises:
        DataError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _classes_beside(folder: Path) -> list[str] | None:
    return class_names(folder / CLASSES) if (folder / CLASSES).exists() else None


def _read(task: _Task, count: Count) -> Part | DataError:
    """All that an index has to know of one tar. A fault is handed over, so that all of them are told at once."""
    path = task.path
    rows: list[tuple[int, int, int, int, int, int]] = []
    skipped: list[Skipped] = []
    tally = Tally(task.pixels)
    try:
        for sample in samples(lambda: path.open("rb"), {"cls", "json"}):
            try:
                row, image = _row(sample, task.pixels)
                tally.add(image)
                rows.append(row)
            except DataError as error:
                skipped.append(Skipped(path=f"{path.name}: {text(sample.key)}", reason=str(error)))
            count(1)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except DataError as error:
        return DataError(f"{path}: {error}")
    except OSError as error:
        return DataError(f"{path}: cannot be read: {error.strerror}")
    if rows and max(row[4] for row in rows) >= task.classes:
        return DataError(f"{path}: label {max(row[4] for row in rows)}, but there are {task.classes} class names")
    return Part(path.name, size, sha256, np.array(rows, ROW), skipped, tally.state())


def _row(sample: Sample, pixels: Pixels) -> tuple[tuple[int, int, int, int, int, int], np.ndarray]:
    """What the index says of a sample, and its image.

    Raises:
        DataError: it has no image or several, or one that cannot be read, or a label that is no number.
    """
    blob, label = sample.image(), _label(sample)
    return (sample.offset, digest(blob), 0, len(blob), label, -1), decode(blob, pixels)


def _label(sample: Sample) -> int:
    """The class of a sample, -1 without one."""
    found: object = -1
    if (number := sample.facts("cls")) is not None:
        found = number.decode(errors="replace")
    elif (facts := sample.facts("json")) is not None:
        try:
            known = json.loads(facts)
        except (ValueError, RecursionError):
            raise DataError("its .json cannot be read") from None
        if isinstance(known, dict):
            found = known.get("label", known.get("cls", -1))
    with suppress(ValueError):
        if isinstance(found, int | str) and not isinstance(found, bool) and -1 <= int(found) < MAX_CLASSES:
            return int(found)
    raise DataError(f"its label is no number of a class: {text(str(found))}")
