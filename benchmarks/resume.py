"""What it costs to go on in the middle of an epoch of 10 million images, against ways that replay what was seen.

    python benchmarks/resume.py [images]

Writes an index of that many rows beside sparse files in a temporary folder, opens it, and asks for the 64 images at a
random place; beside it, in the same run, a permutation of the whole set, walking our own order up to there, and
webdataset reading up to there. The last two are measured over fewer images and extrapolated to half an epoch, the mean
place of a stop. Medians of seven rounds with quartiles, one process, everything in the page cache.
"""

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from explora.data import ShardSet
from explora.data.mixture import Draws, Mixture
from explora.data.order import Order
from explora.data.shards.manifest import INDEX, ROW, Manifest, ShardFile, write_manifest

BATCH, ROUNDS = 64, 7
IMAGE, SHARD = 30_000, 8_000  # bytes of an image, images of a shard
WALKED, READ, READ_BYTES = 200_000, 20_000, 2_000


def synthetic(folder: Path, images: int) -> None:
    """A packed set as far as its index, its manifest and the sizes of its files go."""
    index = np.lib.format.open_memmap(folder / INDEX, "w+", ROW, (images,))
    for start in range(0, images, 1_000_000):
        numbers = np.arange(start, min(start + 1_000_000, images))
        rows = index[start : start + len(numbers)]
        rows["shard"], rows["offset"] = numbers // SHARD, numbers % SHARD * IMAGE
        rows["size"], rows["digest"], rows["label"], rows["group"] = IMAGE, numbers, numbers % 62, -1
    index.flush()
    shards = []
    for start in range(0, images, SHARD):
        count = min(SHARD, images - start)
        shard = ShardFile(file=f"shard-{start // SHARD:06d}.tar", samples=count, bytes=count * IMAGE, sha256="0" * 64)
        with (folder / shard.file).open("wb") as file:
            file.truncate(shard.bytes)
        shards.append(shard)
    classes = [f"class {number}" for number in range(62)]
    size = sum(shard.bytes for shard in shards)
    manifest = Manifest(
        name="synthetic",
        samples=images,
        bytes=size,
        classes=classes,
        shards=shards,
        fingerprint=f"{images:064d}",
        index_sha256="0" * 64,
    )
    write_manifest(folder, manifest)


def tars(path: Path) -> Path:
    """Small samples in one tar, which is kind to whoever has to read all of them."""
    with tarfile.open(path, "w") as tar:
        for number in range(READ):
            info = tarfile.TarInfo(f"{number:09d}.jpg")
            info.size = READ_BYTES
            tar.addfile(info, io.BytesIO(b"\0" * READ_BYTES))
    return path


def first_batch(shards: ShardSet, order: Order, place: int) -> int:
    """Where the images of a batch lie; the stream begins anew, as after a stop."""
    draws = Draws(Mixture([shards]), order, seed=0)
    rows = shards.index[[draws[at].sample for at in range(place, place + BATCH)]]
    return int(rows["offset"].sum())


def walk(shards: ShardSet) -> None:
    draws = Draws(Mixture([shards]), Order(), seed=0)
    for at in range(WALKED):
        draws[at]


def skip(tar: Path) -> None:
    samples = iter(webdataset.WebDataset(str(tar), shardshuffle=False))
    for _ in range(READ - 1):
        next(samples)


def seconds(work: Callable[[], object], times: float = 1) -> np.ndarray:
    """Quartiles of what it takes, extrapolated by a factor."""
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        taken.append((time.perf_counter() - start) * times)
    return np.percentile(taken, [25, 50, 75])


def shown(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthetic(folder, images)
        tar = tars(folder / "small.tar")
        shards = ShardSet.open(folder)
        places = np.random.default_rng(0)

        def batch(order: Order) -> Callable[[], object]:
            return lambda: first_batch(shards, order, int(places.integers(100 * images)))

        def start() -> int:
            return first_batch(ShardSet.open(folder), Order(), int(places.integers(100 * images)))

        half = images / 2
        rows = {
            f"open the set ({len(shards.manifest.shards)} shards)": seconds(lambda: ShardSet.open(folder)),
            f"first {BATCH} images at a random place, blocks": seconds(batch(Order())),
            "open, and the first images": seconds(start),
            f"first {BATCH} images at a random place, full shuffle": seconds(batch(Order(shuffle="full"))),
            f"walk our order up to half an epoch (from {WALKED:,})": seconds(lambda: walk(shards), half / WALKED),
            f"webdataset up to half an epoch (from {READ:,} of 2 kB)": seconds(lambda: skip(tar), half / READ),
        }
    ours = rows["open, and the first images"][1]
    print(f"| {images:,} images | median | quartiles | against open + first images |")
    print("|---|---:|---:|---:|")
    for what, (low, middle, high) in rows.items():
        print(f"| {what} | {shown(middle)} | {shown(low)} to {shown(high)} | x {middle / ours:,.3g} |")


if __name__ == "__main__":
    main()
