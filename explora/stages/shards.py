"""`explora index`, `explora stats` and `explora verify`: what is done with tars that are there already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from explora import config as configs
from explora.bands import PHOTOGRAPH, Pixels
from explora.data import ShardSet
from explora.data.shards.adopt import adopt, class_names
from explora.data.shards.survey import record, survey
from explora.stages.pack import watched
from explora.stages.training import logger


def index(
    folder: str | Path,
    name: str | None = None,
    classes: str | Path | None = None,
    workers: int | None = None,
    pixels: str | Path | Mapping[str, Any] | None = None,
) -> ShardSet:
    """Adopt a folder of other people's WebDataset tars where it lies: adds an index and a manifest, moves nothing.

    Args:
        folder: where the tars are.
        name: what to call the data; None takes the name of the folder.
        classes: a text file with one class name to a line, in the order of the labels; None takes `classes.txt` in the
            folder where there is one, or else the numbers.
        workers: processes; 0 works in this one, None takes as many as there are cores.
        pixels: what the stored values mean, as for `explora.pack`; None: 8-bit RGB.

    Raises:
        ConfigError: a mistake in `pixels`.
        DataError: no tars, an index already, damaged or compressed tars, or labels without a class.
        RunError: a worker process was killed.
    """
    names = None if classes is None else class_names(Path(classes))
    with watched(f"indexing {folder}") as progress:
        return adopt(
            folder,
            name=name or Path(folder).resolve().name,
            classes=names,
            pixels=PHOTOGRAPH if pixels is None else configs.load(Pixels, pixels),
            workers=workers,
            progress=progress,
        )


def stats(folder: str | Path, workers: int | None = None) -> Pixels:
    """Compute the statistics of all bands from the images, log them as a table, and record them in the manifest.

    Returns:
        What is recorded.

    Raises:
        DataError: the shards are damaged.
        RunError: a worker process was killed, or the manifest cannot be written.
    """
    shards = ShardSet.open(folder)
    with watched(f"measuring {folder}") as progress:
        pixels = survey(shards, workers=workers, progress=progress)
    record(shards, pixels)
    logger.info("%s", "\n".join(_table(pixels)))
    return pixels


def verify(folder: str | Path, workers: int | None = None) -> ShardSet:
    """Compare every file and every image of packed shards with what was packed.

    Raises:
        DataError: says how much differs, and names the first ten.
        RunError: a worker process was killed.
    """
    shards = ShardSet.trusted(folder)
    with watched(f"verifying {folder}") as progress:
        shards.verify(workers=workers, progress=progress)
    logger.info("%s: whole, %d images in %d shard(s)", folder, len(shards), len(shards.manifest.shards))
    return shards


def _table(pixels: Pixels) -> Iterator[str]:
    """Stored values, then the same in units where these differ."""
    columns = ("mean", "std", "p1", "p2", "p98", "p99")
    ways = [("as stored", 1.0, 0.0)]
    if (pixels.scale, pixels.offset) != (1.0, 0.0):
        ways.append((f"in {pixels.unit}", pixels.scale, pixels.offset))
    for title, scale, offset in ways:
        yield f"{title:<12}" + "".join(f"{column:>12}" for column in columns)
        for band in pixels.bands:
            if band.statistics is None:
                yield f"{band.name:<12}" + "no values"
                continue
            found = [getattr(band.statistics, column) * scale for column in columns]
            moved = [value + (offset if column != "std" else 0) for value, column in zip(found, columns, strict=True)]
            yield f"{band.name:<12}" + "".join(f"{value:>12.5g}" for value in moved)
