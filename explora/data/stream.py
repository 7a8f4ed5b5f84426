"""The endless order of samples: any step can be reached directly, on any number of workers and ranks."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from explora.data.index import ShardSet
from explora.data.intake import Intake
from explora.data.views import ORDER, Key, Views
from explora.errors import ConfigError, DataError


class Position(TypedDict):
    """Where a stream stands: all that is needed to go on exactly."""

    fingerprint: str
    seed: int
    samples: int
    batch_size: int


@dataclass(frozen=True)
class Step:
    """This rank's batches of one optimizer step, stacked and on the CPU; `views.finish` makes them ready."""

    index: int
    micro_batches: list[dict[str, Tensor]]
    images: int
    """Images of the step on all ranks."""


@functools.lru_cache(maxsize=4)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all n samples in an epoch, int64 (n,).

    Remembered for this epoch and the next, for two streams side by side.
    """
    permutation = Key(seed, epoch, 0).rng(ORDER).permutation(n)
    permutation.flags.writeable = False
    return permutation


class Stream:
    """Micro-batches for training, epoch after epoch without a seam.

    The order, the crops and the masks depend on the seed and the sample's global number only, so neither the
    number of workers or ranks nor a stop in between changes a pixel.

    Args:
        batch_size: images of one step over all ranks.
        micro_batches: parts that each rank cuts its images of a step into.
        rank: which of the `ranks` equal parts of every step this stream yields.

    Raises:
        ConfigError: ranks times `micro_batches` does not divide `batch_size`.
        DataError: the views want labels that the shards lack, or `position` belongs to another stream.
    """

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        position: Position | None = None,
        micro_batches: int = 1,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        parts = ranks * micro_batches
        if batch_size < 1 or parts < 1 or batch_size % parts:
            of = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise ConfigError(
                f"batch_size {batch_size} cannot be cut into {micro_batches} equal micro-batches{of}; "
                f"choose a multiple of {max(1, parts)}"
            )
        unlabelled = int((shards.labels < 0).sum())
        if "label" in views.names() and unlabelled:
            raise DataError(
                f"{shards.folder}: {unlabelled} of {len(shards)} images have no label, but this task "
                f"needs one; pack them from one folder for each class"
            )
        self._shards, self._views = shards, views
        self._batch_size, self._micro_batches = batch_size, micro_batches
        self._seed, self._workers = seed, workers
        self._rank, self._ranks = rank, ranks
        self._samples = 0
        if position is not None:
            self.load_state_dict(position)

    def steps(self, stop: int) -> Iterator[Step]:
        """Steps from the position up to, not including, step `stop`.

        While step i is being handled, `state_dict` already points behind it.
        """
        start = self._samples // self._batch_size
        batches = _load(self._shards, self._views, self._tasks(start, stop), self._workers)
        for index in range(start, stop):
            micro_batches = [next(batches) for _ in range(self._micro_batches)]
            self._samples = (index + 1) * self._batch_size
            yield Step(index, micro_batches, self._batch_size)

    def state_dict(self) -> Position:
        """Plain strings and numbers; `samples` counts the images handed out since the start."""
        return {
            "fingerprint": self._shards.fingerprint,
            "seed": self._seed,
            "samples": self._samples,
            "batch_size": self._batch_size,
        }

    def load_state_dict(self, position: Position) -> None:
        """Go to `position`.

        Raises:
            DataError: says which of data, seed and batch size differ.
        """
        here = self.state_dict()
        differ = [
            f"{what}: saved {saved}, now {now}"
            for what, saved, now in (
                ("data (fingerprint)", position["fingerprint"], here["fingerprint"]),
                ("seed", position["seed"], here["seed"]),
                ("batch size", position["batch_size"], here["batch_size"]),
            )
            if saved != now
        ]
        if differ:
            raise DataError(
                "cannot resume: this checkpoint was written with other settings; "
                "restore them or start a new run\n  " + "\n  ".join(differ)
            )
        self._samples = position["samples"]

    def _tasks(self, start: int, stop: int) -> Iterator[_Task]:
        n, mine = len(self._shards), self._batch_size // self._ranks
        size = mine // self._micro_batches
        for first in range(start * self._batch_size, stop * self._batch_size, self._batch_size):
            for offset in range(self._rank * mine, (self._rank + 1) * mine, size):
                places = (divmod(first + offset + number, n) for number in range(size))
                keys = [Key(self._seed, epoch, int(order(n, self._seed, epoch)[at])) for epoch, at in places]
                yield _Task(keys, self._seed, first, self._batch_size, offset)


def batches(shards: ShardSet, views: Views, batch_size: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Every image once, in the order of the shards, for evaluation; the last batch may be smaller.

    As in a step, `views.finish` makes a batch ready. Labels are -1 where there are none.
    """
    tasks = (
        _Task(
            [Key(0, 0, index) for index in range(first, min(first + batch_size, len(shards)))],
            0,
            first,
            batch_size,
            0,
        )
        for first in range(0, len(shards), batch_size)
    )
    return _load(shards, views, tasks, workers)


def crops(shards: ShardSet, views: Views, keys: Iterable[Key]) -> dict[str, Tensor]:
    """The crops of some images, stacked, as a worker makes them.

    Raises:
        DataError: an image cannot be read.
    """
    intake = Intake(shards.pixels, views)
    samples = [views.sample(intake(shards.image(key.sample)), key) for key in keys]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class _Task(NamedTuple):
    """What a worker needs to make one micro-batch: its images, and its place in the whole step."""

    keys: list[Key]
    seed: int
    first: int
    batch_size: int
    offset: int


class _Batches(Dataset):
    """Makes the micro-batch of a task."""

    def __init__(self, shards: ShardSet, views: Views) -> None:
        self._shards, self._views = shards, views
        self._intake = Intake(shards.pixels, views)

    def __getitem__(self, task: _Task) -> dict[str, Tensor] | DataError:
        try:
            samples = [self._views.sample(self._intake(self._shards.image(key.sample)), key) for key in task.keys]
        except DataError as error:
            # Handed over as a value: raised in a worker, its message would be buried in a traceback.
            return error
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        shared = self._views.step(task.seed, task.first, task.batch_size)
        batch |= {name: whole[task.offset : task.offset + len(task.keys)] for name, whole in shared.items()}
        if "label" in self._views.names():
            batch["label"] = torch.tensor([int(self._shards.labels[key.sample]) for key in task.keys])
        return batch


def _load(shards: ShardSet, views: Views, tasks: Iterable[_Task], workers: int) -> Iterator[dict[str, Tensor]]:
    loader: DataLoader = DataLoader(
        _Batches(shards, views),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        worker_init_fn=_begin_work,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader must not draw from the global one, or a resumed run would differ.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _begin_work(_: int) -> None:
    torch.set_num_threads(1)
    # A cluster that wants a job to stop tells all its processes; training still needs this one to reach a checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
