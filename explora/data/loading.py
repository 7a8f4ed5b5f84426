"""From keys to stacked crops, in worker processes; what cannot be read is stood in for and named."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from explora.data.intake import Intake
from explora.data.mixture import Mixture
from explora.data.shards.index import ShardSet
from explora.data.views import Key, Views
from explora.errors import DataError, ExploraError


class Task(NamedTuple):
    """What a worker needs to make one micro-batch: its images, and its place in the whole step."""

    keys: list[Key]
    seed: int
    first: int
    batch_size: int
    offset: int


class Unreadable(NamedTuple):
    """An image that another one stands in for."""

    where: str
    """Shard, number and name; always the same for an image."""
    why: str
    """What is wrong with it, and where."""


class Made(NamedTuple):
    """What a worker hands back."""

    batch: dict[str, Tensor]
    unreadable: list[Unreadable]


class Read(NamedTuple):
    """An image as the views want it."""

    image: np.ndarray
    """uint8 (H, W, bands of the views)."""
    label: int | np.ndarray
    """Its class, -1 without one; or whether it is of each class, uint8 (C,), where images may be of several."""
    unreadable: list[Unreadable]
    """What it stands in for."""


class Levels:
    """Reads images of a mixture as the views want them: their bands, as 8-bit levels.

    For one that cannot be read the next one of its set stands in, whoever asks: the same for all ranks, and again
    after a stop.

    Args:
        tries: images that are tried before it is an error.
    """

    def __init__(self, mixture: Mixture, views: Views, tries: int) -> None:
        self._mixture, self._least, self._tries = mixture, views.needed(), tries
        self._labelled = "label" in views.names()
        self._several = any(one.multilabel for one in mixture.sets)
        self._intakes = [Intake(one.pixels, views) for one in mixture.sets]

    def __call__(self, key: Key) -> Read:
        number, asked = self._mixture.locate(key.sample)
        one, first = self._mixture.sets[number], self._mixture.firsts[number]
        wrong: list[Unreadable] = []
        for step in range(min(self._tries, len(one))):
            at = (asked + step) % len(one)
            try:
                image = self._intakes[number](one.image(at, least=self._least))
            except DataError as error:
                wrong.append(Unreadable(one.where(at), str(error)))
            else:
                return Read(image, self._label(one, at, first + at) if self._labelled else -1, wrong[:1])
        others = f"; nor can the {len(wrong) - 1} images after it" if len(wrong) > 1 else ""
        raise DataError(wrong[0].why + others)

    def _label(self, one: ShardSet, at: int, index: int) -> int | np.ndarray:
        return one.targets[at] if self._several else int(self._mixture.labels[index])


class Batches(Dataset):
    """Makes the micro-batch of a task.

    Args:
        read: the image for a key; what it raises ends the run.
    """

    def __init__(self, read: Callable[[Key], Read], views: Views) -> None:
        self._read, self._views = read, views

    def __getitem__(self, task: Task) -> Made | ExploraError:
        try:
            read = [self._read(key) for key in task.keys]
        except ExploraError as error:
            # Handed over as a value: raised in a worker, its message would be buried in a traceback.
            return error
        batch = stacked([self._views.sample(one.image, key) for one, key in zip(read, task.keys, strict=True)])
        shared = self._views.step(task.seed, task.first, task.batch_size)
        batch |= {name: whole[task.offset : task.offset + len(task.keys)] for name, whole in shared.items()}
        if "label" in self._views.names():
            batch["label"] = torch.from_numpy(np.stack([one.label for one in read]))
        return Made(batch, [wrong for one in read for wrong in one.unreadable])


def stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The crops of several images, along a new first axis."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def load(batches: Batches, tasks: Iterable[Task], workers: int) -> Iterator[Made]:
    """What each task asks for, in the order of the tasks.

    Raises:
        DataError: an image is damaged, and so are those that may stand in for it.
        RunError: a shard cannot be read.
    """
    loader: DataLoader = DataLoader(
        batches,
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        worker_init_fn=_begin_work,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader must not draw from the global one, or a resumed run would differ.
        generator=torch.Generator(),
    )
    for made in loader:
        if isinstance(made, ExploraError):
            raise made
        yield made


def _begin_work(_: int) -> None:
    torch.set_num_threads(1)
    # A cluster that wants a job to stop tells all its processes; training still needs this one to reach a checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
