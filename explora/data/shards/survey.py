"""Looks at all images of packed shards again for their statistics."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from explora.bands import Pixels
from explora.data.shards.crew import Count, Progress, work
from explora.data.shards.index import ShardSet
from explora.data.shards.manifest import write_manifest
from explora.data.shards.parts import with_statistics
from explora.data.statistics import Tally


class _Task(NamedTuple):
    """Images that follow each other, in one shard."""

    shards: ShardSet
    first: int
    end: int


def survey(shards: ShardSet, *, workers: int | None = 0, progress: Progress | None = None) -> Pixels:
    """What the pixels of a set mean, with statistics that are computed from all images; the manifest stays as it is.

    Args:
        workers: processes; 0 works in this one, None takes as many as there are cores for this process.

    Raises:
        DataError: an image cannot be read.
        RunError: a worker was killed.
    """
    ends = np.cumsum([0, *(shard.samples for shard in shards.manifest.shards)]).tolist()
    tasks = [_Task(shards, first, end) for first, end in itertools.pairwise(ends)]
    tally = Tally(shards.pixels)
    for state in work(_count, tasks, workers, progress=progress, total=len(shards)):
        tally.merge(Tally.of_state(shards.pixels, state))
    return with_statistics(shards.pixels, tally)


def record(shards: ShardSet, pixels: Pixels) -> None:
    """Write other statistics into the manifest, whole or not at all; the fingerprint does not hang on them.

    Raises:
        RunError: it cannot be written.
    """
    write_manifest(shards.folder, shards.manifest.model_copy(update={"pixels": pixels}))


def _count(task: _Task, count: Count) -> dict[str, np.ndarray]:
    tally = Tally(task.shards.pixels)
    for index in range(task.first, task.end):
        tally.add(task.shards.image(index))
        count(1)
    return tally.state()
