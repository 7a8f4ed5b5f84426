"""The endless sequence of samples: any step can be reached directly, on any number of workers and ranks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from torch import Tensor

from explora.data.loading import Batches, Levels, Task, Unreadable, load, stacked
from explora.data.mixture import CYCLE, Draws, Mixture
from explora.data.order import Order
from explora.data.shards.index import ShardSet
from explora.data.views import Key, Views
from explora.errors import ConfigError, DataError

logger = logging.getLogger("explora")

TRIES = 16
"""Images tried in the place of one that cannot be read, itself included."""
_FEW = 10
"""Unreadable images on one rank that no run stops for, however short it is yet."""


class Position(TypedDict):
    """Where a stream stands: all that is needed to go on exactly."""

    fingerprint: str
    seed: int
    epoch: int
    samples: int
    global_batch: int
    order: str


@dataclass(frozen=True)
class Step:
    """This rank's batches of one optimizer step, stacked and on the CPU; `views.finish` makes them ready."""

    index: int
    micro_batches: list[dict[str, Tensor]]
    images: int
    """Images of the step on all ranks."""
    unreadable: tuple[Unreadable, ...] = ()
    """Images of this rank that cannot be read and that others stand in for, each as often as it was met."""


class Steps(ABC):
    """What `Stream` and `RemoteStream` share: how steps are cut, what a position says, how much damage is borne."""

    _source: ClassVar[str]
    """How messages call what the fingerprint is of."""
    _beyond: ClassVar[str]
    """How they say how many cannot be read."""

    def __init__(
        self,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        position: Position | None,
        micro_batches: int,
        rank: int,
        ranks: int,
        max_corrupt: float,
    ) -> None:
        parts = ranks * micro_batches
        if batch_size < 1 or parts < 1 or batch_size % parts:
            of = f" on each of {ranks} ranks" if ranks > 1 else ""
            raise ConfigError(
                f"batch_size {batch_size} cannot be cut into {micro_batches} equal micro-batches{of}; "
                f"choose a multiple of {max(1, parts)}"
            )
        self._views, self._seed, self._workers = views, seed, workers
        self._batch_size, self._micro_batches = batch_size, micro_batches
        self._rank, self._ranks = rank, ranks
        self._max_corrupt = max_corrupt
        self._samples = self._met = 0
        self._latest: deque[str] = deque(maxlen=3)  # unreadable ones
        self.corrupt = 0
        """What this rank could not read since it started."""
        if position is not None:
            self.load_state_dict(position)

    @abstractmethod
    def state_dict(self) -> Position:
        """Plain strings and numbers that say where the stream stands."""

    @abstractmethod
    def _batches(self) -> Batches:
        """What makes the micro-batches of the steps from the position on."""

    @abstractmethod
    def _keys(self) -> Callable[[int], Key]:
        """The key of each image by its number in the run."""

    @abstractmethod
    def _go_to(self, position: Position) -> None:
        """Set `_samples`."""

    def steps(self, stop: int) -> Iterator[Step]:
        """Steps from the position up to, not including, step `stop`.

        While step i is being handled, `state_dict` already points behind it.

        Raises:
            DataError: too much cannot be read, or 16 images in a row.
        """
        start = self._samples // self._batch_size
        made = load(self._batches(), self._tasks(start, stop), self._workers)
        for index in range(start, stop):
            parts = [next(made) for _ in range(self._micro_batches)]
            self._samples = (index + 1) * self._batch_size
            unreadable = tuple(which for part in parts for which in part.unreadable)
            self._count(unreadable)
            yield Step(index, [part.batch for part in parts], self._batch_size, unreadable)

    def load_state_dict(self, position: Position) -> None:
        """Go to `position`.

        Raises:
            DataError: says which of data, seed, batch size and order differ.
        """
        words = {"fingerprint": self._source, "seed": "seed", "global_batch": "batch size", "order": "order"}
        here, saved = dict(self.state_dict()), dict(position)
        differ = [
            f"\n  {what}: saved {saved.get(key)}, now {here[key]}"
            for key, what in words.items()
            if saved.get(key) != here[key]
        ]
        if differ:
            raise DataError(
                "cannot resume: this checkpoint was written with other settings; restore them or start a new run"
                + "".join(differ)
            )
        self._go_to(position)

    def _tasks(self, start: int, stop: int) -> Iterator[Task]:
        key, mine = self._keys(), self._batch_size // self._ranks
        size = mine // self._micro_batches
        for first in range(start * self._batch_size, stop * self._batch_size, self._batch_size):
            for offset in range(self._rank * mine, (self._rank + 1) * mine, size):
                keys = [key(first + offset + number) for number in range(size)]
                yield Task(keys, self._seed, first, self._batch_size, offset)

    def _count(self, unreadable: tuple[Unreadable, ...]) -> None:
        self._met += self._batch_size // self._ranks
        self._latest.extend(which.why for which in unreadable)
        self.corrupt += len(unreadable)
        bearable = max(_FEW, self._max_corrupt * self._met) if self._max_corrupt else 0
        if unreadable and self.corrupt > bearable:
            latest = "".join(f"\n  {why}" for why in self._latest)
            raise DataError(
                f"{self._beyond.format(self.corrupt, self._met)}, which is more than max_corrupt "
                f"({self._max_corrupt:g}) allows; look at where they lie, or raise max_corrupt{latest}"
            )


class Stream(Steps):
    """Micro-batches for training, epoch after epoch without a seam.

    The order, the crops and the masks depend on the seed and the sample's global number only, so neither the
    number of workers or ranks nor a stop in between changes a pixel. A batch that takes more images than a set has
    runs into the set's next epoch, so it holds some of them twice; a warning says so once.

    An image that cannot be read is passed over for the next one of its set that can be, cropped as the first would
    have been.

    Args:
        batch_size: images of one step over all ranks.
        order: how every epoch is shuffled.
        micro_batches: parts that each rank cuts its images of a step into.
        rank: which of the `ranks` equal parts of every step this stream yields.
        max_corrupt: share of the images of this rank, since its start, beyond which unreadable ones stop the run;
            ten never do, unless the share is 0.

    Raises:
        ConfigError: ranks times `micro_batches` does not divide `batch_size`.
        DataError: the views or a balanced order want labels that the shards lack, or `position` belongs to another
            stream.
    """

    _source = "data (fingerprint)"
    _beyond = "{} of {} images cannot be read"

    def __init__(
        self,
        shards: ShardSet | Mixture,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        order: Order = Order(),  # noqa: B008  frozen
        position: Position | None = None,
        micro_batches: int = 1,
        rank: int = 0,
        ranks: int = 1,
        max_corrupt: float = 0.001,
    ) -> None:
        self._mixture = shards if isinstance(shards, Mixture) else Mixture([shards])
        self._order = order
        super().__init__(
            views,
            batch_size=batch_size,
            seed=seed,
            workers=workers,
            position=position,
            micro_batches=micro_batches,
            rank=rank,
            ranks=ranks,
            max_corrupt=max_corrupt,
        )
        if "label" in views.names():
            _refuse_unlabelled([one for one in self._mixture.sets if not one.multilabel], "this task")
            _refuse_unlike_classes(self._mixture)
        if order.balance:
            _refuse_multilabel(self._mixture)
            _refuse_unlabelled(self._mixture.sets, "order.balance")
        _warn_of_few(self._mixture, batch_size)

    def state_dict(self) -> Position:
        """Plain strings and numbers; `samples` counts the images of this epoch that are handed out."""
        epoch, samples = divmod(self._samples, len(self._mixture))
        return {
            "fingerprint": self._mixture.fingerprint,
            "seed": self._seed,
            "epoch": epoch,
            "samples": samples,
            "global_batch": self._batch_size,
            "order": str(self._order),
        }

    def _go_to(self, position: Position) -> None:
        self._samples = position["epoch"] * len(self._mixture) + position["samples"]

    def _batches(self) -> Batches:
        return Batches(Levels(self._mixture, self._views, TRIES), self._views)

    def _keys(self) -> Callable[[int], Key]:
        return Draws(self._mixture, self._order, self._seed).__getitem__


def batches(shards: ShardSet, views: Views, batch_size: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """Every image once, in the order of the shards, for evaluation; the last batch may be smaller.

    As in a step, `views.finish` makes a batch ready. Labels are -1 where there are none.

    Raises:
        DataError: an image cannot be read.
    """
    tasks = (
        Task(
            [Key(0, 0, index) for index in range(first, min(first + batch_size, len(shards)))],
            0,
            first,
            batch_size,
            0,
        )
        for first in range(0, len(shards), batch_size)
    )
    levels = Levels(Mixture([shards]), views, tries=1)
    return (made.batch for made in load(Batches(levels, views), tasks, workers))


def crops(shards: ShardSet | Mixture, views: Views, keys: Iterable[Key]) -> dict[str, Tensor]:
    """The crops of some images, stacked, as a worker makes them.

    Raises:
        DataError: an image cannot be read.
    """
    levels = Levels(shards if isinstance(shards, Mixture) else Mixture([shards]), views, tries=1)
    return stacked([views.sample(levels(key).image, key) for key in keys])


def _refuse_unlabelled(sets: Iterable[ShardSet], who: str) -> None:
    for one in sets:
        unlabelled = int((one.labels < 0).sum())
        if unlabelled:
            raise DataError(
                f"{one.folder}: {unlabelled} of {len(one)} images have no label, but {who} "
                f"needs one; pack them from one folder for each class"
            )


def _refuse_unlike_classes(mixture: Mixture) -> None:
    if mixture.classes is None or len({one.multilabel for one in mixture.sets}) > 1:
        raise DataError(
            f"{mixture.folder}: these sets have other classes each, but this task needs the same ones in the same "
            "order; pack them from folders of the same names"
        )


def _refuse_multilabel(mixture: Mixture) -> None:
    if mixture.multilabel:
        raise DataError(
            f"{mixture.folder}: images may have several labels each, but order.balance makes classes equally frequent "
            "of which each image has one; set it to 0"
        )


def _warn_of_few(mixture: Mixture, batch_size: int) -> None:
    for one, count in zip(mixture.sets, mixture.counts, strict=True):
        taken = batch_size * count / CYCLE
        if len(one) < taken:
            logger.warning(
                "%s: %d images, of which a batch takes %g; it runs into their next epoch and holds some of them twice",
                *(one.folder, len(one), round(taken, 1)),
            )
