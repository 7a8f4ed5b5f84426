"""From image numbers to stacked crops, in worker processes; what cannot be read is stood in for and named."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from explora.data.intake import Intake
from explora.data.mixture import Mixture
from explora.data.views import Key, Views
from explora.errors import DataError


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


class _Read(NamedTuple):
    """An image, or the one that stands in for it."""

    image: np.ndarray
    number: int
    wrong: Unreadable | None
    """Set where it is not the one that was asked for."""


class Levels:
    """Reads images of a mixture as the views want them: their bands, as 8-bit levels.

    For one that cannot be read the next one of its set stands in, whoever asks: the same for all ranks, and again
    after a stop.

    Args:
        tries: images that are tried before it is an error.
    """

    def __init__(self, mixture: Mixture, views: Views, tries: int) -> None:
        self._mixture, self._least, self._tries = mixture, views.needed(), tries
        self._intakes = [Intake(one.pixels, views) for one in mixture.sets]

    def __call__(self, index: int) -> _Read:
        number, asked = self._mixture.locate(index)
        one, first = self._mixture.sets[number], self._mixture.firsts[number]
        wrong: list[Unreadable] = []
        for step in range(min(self._tries, len(one))):
            at = (asked + step) % len(one)
            try:
                image = self._intakes[number](one.image(at, least=self._least))
            except DataError as error:
                wrong.append(Unreadable(one.where(at), str(error)))
            else:
                return _Read(image, first + at, wrong[0] if wrong else None)
        others = f"; nor can the {len(wrong) - 1} images after it" if len(wrong) > 1 else ""
        raise DataError(wrong[0].why + others)


class _Batches(Dataset):
    """Makes the micro-batch of a task."""

    def __init__(self, mixture: Mixture, views: Views, tries: int) -> None:
        self._mixture, self._views = mixture, views
        self._levels = Levels(mixture, views, tries)

    def __getitem__(self, task: Task) -> Made | DataError:
        try:
            read = [self._levels(key.sample) for key in task.keys]
        except DataError as error:
            # Handed over as a value: raised in a worker, its message would be buried in a traceback.
            return error
        samples = [self._views.sample(one.image, key) for one, key in zip(read, task.keys, strict=True)]
        batch = stacked(samples)
        shared = self._views.step(task.seed, task.first, task.batch_size)
        batch |= {name: whole[task.offset : task.offset + len(task.keys)] for name, whole in shared.items()}
        if "label" in self._views.names():
            batch["label"] = torch.tensor([int(self._mixture.labels[one.number]) for one in read])
        return Made(batch, [one.wrong for one in read if one.wrong is not None])


def stacked(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The crops of several images, along a new first axis."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def load(mixture: Mixture, views: Views, tasks: Iterable[Task], workers: int, tries: int) -> Iterator[Made]:
    """What each task asks for, in the order of the tasks.

    Raises:
        DataError: neither an image nor those that may stand in for it, `tries` in all, can be read.
    """
    loader: DataLoader = DataLoader(
        _Batches(mixture, views, tries),
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        worker_init_fn=_begin_work,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader must not draw from the global one, or a resumed run would differ.
        generator=torch.Generator(),
    )
    for made in loader:
        if isinstance(made, DataError):
            raise made
        yield made


def _begin_work(_: int) -> None:
    torch.set_num_threads(1)
    # A cluster that wants a job to stop tells all its processes; training still needs this one to reach a checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
