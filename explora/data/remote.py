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
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from pydantic import Field
from torch.utils.data import get_worker_info

from explora.bands import PHOTOGRAPH, Pixels
from explora.config import Config
from explora.data.decode import decode
from explora.data.intake import Intake
from explora.data.loading import Batches, Read, Unreadable
from explora.data.remote_tars import SCHEME, Tars, check, expanded, shown
from explora.data.stream import TRIES, Position, Steps
from explora.data.views import Key, Views
from explora.errors import DataError

logger = logging.getLogger("explora")


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


class RemoteStream(Steps):
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

    _source = "urls"
    _beyond = "{} images or tars cannot be read beside {} that can"

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
        if "label" in views.names():
            raise DataError(f"{shards.name}: remote tars have no labels, but this task needs them; pack them first")
        self._shards, self._intake = shards, Intake(shards.pixels, views)
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

    def _go_to(self, position: Position) -> None:
        """Count on, with other images; the first rank warns of it."""
        self._samples = position["samples"]
        if self._samples and self._rank == 0:
            logger.warning("%s: not exactly resumable: goes on with other images", self._shards.name)

    def _batches(self) -> Batches:
        images = _Images(self._shards, self._intake, self._views, f"{self._seed}/{self._samples}/{self._rank}")
        return Batches(images, self._views)

    def _keys(self) -> Callable[[int], Key]:
        return lambda number: Key(self._seed, 0, number)


class _Images:
    """Whatever image comes next in this process that can be read, as the views want it."""

    def __init__(self, shards: RemoteSet, intake: Intake, views: Views, seed: str) -> None:
        self._shards, self._intake, self._least, self._seed = shards, intake, views.needed(), seed

    def __call__(self, key: Key) -> Read:
        """Read on, whatever the `key` is.

        Raises:
            DataError: 16 in a row cannot be read, or the tars hold none.
        """
        tars = self._tars
        for _ in range(TRIES):
            where, blob = next(tars)
            try:
                image = self._intake(decode(blob, self._shards.pixels, least=self._least))
            except DataError as error:
                tars.lost.append(Unreadable(where, f"{where}: {error}"))
            else:
                lost, tars.lost = tars.lost, []
                return Read(image, -1, lost)
        raise DataError(f"{tars.lost[-1].why}; nor can the {TRIES - 1} images before it")

    @cached_property
    def _tars(self) -> Tars:
        """Opened where they are read from: each worker goes through them in an order of its own."""
        worker = get_worker_info()
        rng = random.Random(f"{self._seed}/{0 if worker is None else worker.id}")
        return Tars(self._shards.urls, self._shards.config.shuffle, rng)
