"""Tars that are read from front to back alone: over http, from pipes, or on a disk without an index.

This is the fallback for images that cannot be packed, and it is not exactly resumable: a run that goes on after a stop
goes on with other images, as many as it would have seen, and says so. Every worker of every rank goes through all tars
in an order of its own, again and again, and shuffles what it reads in a buffer of its own. So none ever waits for
another or runs out, however few the tars are, and two may read the same image at the same time.

What is in the tars may come from strangers; `sources` says why it can do nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset, get_worker_info

from explora.bands import PHOTOGRAPH, Pixels
from explora.config import Config
from explora.data.decode import decode
from explora.data.intake import Intake
from explora.data.loading import Made, Task, Unreadable, stacked
from explora.data.remote_tars import SCHEME, Tars, check, expanded, shown
from explora.data.stream import Position, Step
from explora.data.views import Key, Views
from explora.errors import ConfigError, DataError

logger = logging.getLogger("explora")

_TRIES = 16
"""Images in a row that cannot be read, and then it is an error."""
_FEW = 10
"""Unreadable images on one rank that no run stops for, however short it is yet."""


class RemoteConfig(Config):
    """Tars that are read from front to back: `http(s)://`, `file://`, paths, and `pipe:` commands."""

    urls: str | tuple[str, ...] = Field(min_length=1)
    """Where they are; braces stand for several: `https://host/train-{000000..000123}.tar`."""
    samples: int | None = Field(None, ge=1)
    """Images in all of them, for lengths in epochs; no tar says so itself."""
    allow_pipes: bool = False
    """Run the commands of `pipe:` urls in a shell; only for urls that you wrote yourself."""
    shuffle: int = Field(1000, ge=1)
    """Images that each worker holds undecoded, to draw the next one from."""
    pixels: Pixels = PHOTOGRAPH
    """What the stored values mean."""


def remote(text: str) -> bool:
    """Whether this names tars to read from front to back, and not a folder of packed shards."""
    return bool(SCHEME.match(text)) or (re.search(r"\.(tar|tgz)\b", text) is not None and not Path(text).is_dir())


class RemoteSet:
    """Tars, and what is known of them without reading: no labels, no index, no image by number.

    Raises:
        ConfigError: a url is none that is read here, or its braces do not match.
        DataError: a file is missing.
    """

    classes = None
    """There are no labels."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self.urls = expanded((config.urls,) if isinstance(config.urls, str) else config.urls)
        """The address of each tar."""
        for url in self.urls:
            check(url, config.allow_pipes)

    @property
    def name(self) -> str:
        """The first url, and how many more there are."""
        return shown(self.urls[0]) + (f" and {len(self.urls) - 1} more" if len(self.urls) > 1 else "")

    @property
    def fingerprint(self) -> str:
        """Digest of the urls; nobody knows what will be in them."""
        return hashlib.sha256(json.dumps(self.urls).encode()).hexdigest()

    @property
    def pixels(self) -> Pixels:
        """What the stored values mean."""
        return self.config.pixels

    @property
    def samples(self) -> int | None:
        """Images in all tars, where the config says so."""
        return self.config.samples

    def __len__(self) -> int:
        if self.samples is None:
            raise DataError(
                f"{self.name}: remote tars do not say how many images they hold; give `samples` beside the urls"
            )
        return self.samples


class RemoteStream:
    """Micro-batches of images from remote tars, laid out as those of `Stream`, without end.

    An image that cannot be read, or a tar that is broken, is passed over and counted.

    Args:
        batch_size: images of one step over all ranks.
        micro_batches: parts that each rank cuts its images of a step into.
        rank: which of the `ranks` equal parts of every step this stream yields.
        max_corrupt: share of the images of this rank, since its start, beyond which unreadable images and tars stop
            the run; ten never do, unless the share is 0.

    Raises:
        ConfigError: ranks times `micro_batches` does not divide `batch_size`.
        DataError: the views want labels or bands that there are not, or `position` belongs to another stream.
    """

    def __init__(
        self,
        shards: RemoteSet,
        views: Views,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        position: Position | None = None,
        micro_batches: int = 1,
        rank: int = 0,
        ranks: int = 1,
        max_corrupt: float = 0.001,
    ) -> None:
        parts = ranks * micro_batches
        if batch_size < 1 or parts < 1 or batch_size % parts:
            raise ConfigError(
                f"batch_size {batch_size} cannot be cut into {micro_batches} equal micro-batches on each of {ranks} "
                f"ranks; choose a multiple of {max(1, parts)}"
            )
        if "label" in views.names():
            raise DataError(f"{shards.name}: remote tars have no labels, but this task needs them; pack them first")
        self._shards, self._views = shards, views
        Intake(shards.pixels, views)  # refuses views that want other bands
        self._batch_size, self._micro_batches = batch_size, micro_batches
        self._seed, self._workers, self._rank, self._ranks = seed, workers, rank, ranks
        self._max_corrupt = max_corrupt
        self._samples = self._met = 0
        self.corrupt = 0
        """Unreadable images and broken tars that this rank has met since it started."""
        if position is not None:
            self.load_state_dict(position)

    def steps(self, stop: int) -> Iterator[Step]:
        """Steps from the position up to, not including, step `stop`.

        Raises:
            DataError: too much cannot be read, or some tars in a row give nothing.
        """
        start = self._samples // self._batch_size
        loader: DataLoader = DataLoader(
            _Images(self._shards, self._views, f"{self._seed}/{self._samples}/{self._rank}"),
            batch_size=None,
            sampler=self._tasks(start, stop),
            num_workers=self._workers,
            worker_init_fn=_begin_work,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader must not draw from the global one
        )
        made = iter(loader)
        for index in range(start, stop):
            parts = [_whole(next(made)) for _ in range(self._micro_batches)]
            self._samples = (index + 1) * self._batch_size
            unreadable = tuple(which for part in parts for which in part.unreadable)
            self._count(unreadable)
            yield Step(index, [part.batch for part in parts], self._batch_size, unreadable)

    def state_dict(self) -> Position:
        """How many images were handed out; not which."""
        return {
            "fingerprint": self._shards.fingerprint,
            "seed": self._seed,
            "epoch": 0,
            "samples": self._samples,
            "global_batch": self._batch_size,
            "order": "remote",
        }

    def load_state_dict(self, position: Position) -> None:
        """Count on from `position`, with other images; the first rank warns of it.

        Raises:
            DataError: says which of urls, seed and batch size differ.
        """
        words = {"fingerprint": "urls", "seed": "seed", "global_batch": "batch size", "order": "order"}
        here, saved = dict(self.state_dict()), dict(position)
        differ = [
            f"{what}: saved {saved.get(key)}, now {here[key]}"
            for key, what in words.items()
            if saved.get(key) != here[key]
        ]
        if differ:
            raise DataError(
                "cannot resume: this checkpoint was written with other settings; "
                "restore them or start a new run\n  " + "\n  ".join(differ)
            )
        self._samples = position["samples"]
        if self._samples and self._rank == 0:
            logger.warning("%s: not exactly resumable: goes on with other images", self._shards.name)

    def _tasks(self, start: int, stop: int) -> Iterator[Task]:
        mine = self._batch_size // self._ranks
        size = mine // self._micro_batches
        for first in range(start * self._batch_size, stop * self._batch_size, self._batch_size):
            for offset in range(self._rank * mine, (self._rank + 1) * mine, size):
                keys = [Key(self._seed, 0, first + offset + number) for number in range(size)]
                yield Task(keys, self._seed, first, self._batch_size, offset)

    def _count(self, unreadable: tuple[Unreadable, ...]) -> None:
        self._met += self._batch_size // self._ranks
        self.corrupt += len(unreadable)
        bearable = max(_FEW, self._max_corrupt * self._met) if self._max_corrupt else 0
        if unreadable and self.corrupt > bearable:
            latest = "".join(f"\n  {which.why}" for which in unreadable[-3:])
            raise DataError(
                f"{self.corrupt} images or tars cannot be read beside {self._met} that can, which is more than "
                f"max_corrupt ({self._max_corrupt:g}) allows; look at the source, or raise max_corrupt{latest}"
            )


class _Images(Dataset):
    """Makes the micro-batch of a task from whatever images come next in this process."""

    def __init__(self, shards: RemoteSet, views: Views, seed: str) -> None:
        self._shards, self._views, self._seed = shards, views, seed
        self._intake = Intake(shards.pixels, views)
        self._tars: Tars | None = None

    def __getitem__(self, task: Task) -> Made | DataError:
        if self._tars is None:
            worker = get_worker_info()
            rng = random.Random(f"{self._seed}/{0 if worker is None else worker.id}")
            self._tars = Tars(self._shards.urls, self._shards.config.shuffle, rng)
        try:
            batch = stacked([self._views.sample(self._levels(self._tars), key) for key in task.keys])
        except DataError as error:
            # Handed over as a value: raised in a worker, its message would be buried in a traceback.
            return error
        shared = self._views.step(task.seed, task.first, task.batch_size)
        batch |= {name: whole[task.offset : task.offset + len(task.keys)] for name, whole in shared.items()}
        lost, self._tars.lost = self._tars.lost, []
        return Made(batch, lost)

    def _levels(self, tars: Tars) -> np.ndarray:
        """The next image that can be read: uint8 (H, W, bands of the views).

        Raises:
            DataError: 16 in a row cannot be, or the tars hold none.
        """
        for _ in range(_TRIES):
            where, blob = next(tars)
            try:
                return self._intake(decode(blob, self._shards.pixels, least=self._views.needed()))
            except DataError as error:
                tars.lost.append(Unreadable(where, f"{where}: {error}"))
        raise DataError(f"{tars.lost[-1].why}; nor can the {_TRIES - 1} images before it")


def _whole(made: Made | DataError) -> Made:
    if isinstance(made, DataError):
        raise made
    return made


def _begin_work(_: int) -> None:
    torch.set_num_threads(1)
    # A cluster that wants a job to stop tells all its processes; training still needs this one to reach a checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
