"""What is looked at while a model learns: by rule the kNN and effective rank of the backbone on the same few images."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from explora.config import Config
from explora.data import Center, Key, Mixture, ShardSet, crops
from explora.distributed import Precision, autocast, on_first
from explora.errors import RunError, TrainingError
from explora.evaluation import KNN, Features, rankme
from explora.models import ViT
from explora.schedules import Length, LengthField, Progress

logger = logging.getLogger("explora")

_AT_ONCE = 64
_A_CLASS = 5
"""Fewer images of a class than these leave too few neighbours of it to vote."""


class MonitorConfig(Config):
    """How the backbone's features are watched during training."""

    shards: str | None = None
    """Labelled shards to look at; null takes those that are pretrained on."""
    every: LengthField = Length(10, "%")
    """How often, beside the start and the end: `100`, `"1 epochs"`, or a part of the run."""
    images: int = Field(400, ge=2)
    """Images looked at: as many of each class where labels are known, else evenly from the whole set."""
    k: int = Field(10, ge=1)
    """Neighbours that vote on the class of an image; fewer where most classes have no more images than this."""

    @field_validator("every")
    @classmethod
    def _some(cls, every: Length) -> Length:
        if every.amount <= 0:
            raise ValueError("expected a length above 0; write `monitor: null` to watch nothing")
        return every


@dataclass
class Seen:
    """What the monitor found so far; kNN in percent, None where it was not measured."""

    floor: float | None = None
    """kNN before the first step."""
    best: float | None = None
    """The highest kNN."""
    best_step: int | None = None
    """Steps taken when it was measured first."""
    last: float | None = None
    """The latest kNN."""
    seconds: float = 0.0
    """Time that looking took, with saving the best."""

    @property
    def alarm(self) -> bool:
        """Whether the backbone is now worse than the one that the run started from."""
        return self.floor is not None and self.last is not None and self.last < self.floor


class Watcher(ABC):
    """Measures what learns on the same images each time; draws nothing at random, changes nothing.

    Args:
        every: how often, beside the start and the end.
        shards: the images; their labels judge, they never teach.
        view: how an image is cut and normalised.
        on_best: called when a measurement is the best so far.
    """

    _settings: str
    """The key of its settings in a config, for messages."""

    def __init__(
        self, every: Length, shards: ShardSet | Mixture, view: Center, on_best: Callable[[], None] | None = None
    ) -> None:
        self.on_best = on_best
        self._every, self._shards, self._view = every, shards, view
        self.seen = Seen()

    @property
    def ended(self) -> bool:
        """Whether training should stop, because nothing more is to be gained."""
        return False

    @abstractmethod
    def measure(self, vit: ViT, precision: Precision = "auto") -> dict[str, float]:
        """What is found now, by the names it gets in a log."""

    @abstractmethod
    def _judge(self, found: dict[str, float], step: int) -> dict[str, float]:
        """Compare with what was found before; what else belongs into the log."""

    def look(self, vit: ViT, progress: Progress, precision: Precision = "auto") -> dict[str, float]:
        """What is found after so many steps, for the row of this step; nothing where it is not its turn.

        Every rank must ask, because a sharded model needs all of them; what the first finds counts.

        Raises:
            DataError, TrainingError: as `measure`.
        """
        step, total = progress.step, progress.steps
        every = max(1, self._every.steps(batch=progress.batch, samples=progress.samples, total=total))
        if step != total and step % every:
            return {}
        began = time.monotonic()
        mine = self.measure(vit, precision)
        found = on_first(lambda: mine)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
        logger.info("step %d/%d  %s", step, total, numbers)
        found |= self._judge(found, step)
        self.seen.seconds += time.monotonic() - began
        return found

    def state_dict(self) -> dict[str, Any]:
        """Plain values: what was found, and what it was found on."""
        view = self._view.model_dump(mode="json")
        return {"seen": asdict(self.seen), "shards": self._shards.fingerprint, "view": view}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what was found.

        Raises:
            RunError: it was found on other images, or on other cuts of them.
        """
        here, name = self.state_dict(), self._settings
        if state["shards"] != here["shards"]:
            raise RunError(
                f"cannot resume: the {name} looked at other images before, so its numbers would not compare; "
                f"restore the shards that it looks at ({name}.shards) or start in another folder"
            )
        if state["view"] != here["view"]:
            raise RunError(
                f"cannot resume: the {name} cut images by {state['view']} before and would by {here['view']} now, so "
                "its numbers would not compare; restore the model's image size, mean and std or start in another folder"
            )
        self.seen = Seen(**state["seen"])


class Monitor(Watcher):
    """Watches what a backbone's features are worth; the best that is kept is that after the start with the best kNN."""

    _settings = "monitor"

    def __init__(
        self, config: MonitorConfig, shards: ShardSet | Mixture, view: Center, on_best: Callable[[], None] | None = None
    ) -> None:
        super().__init__(config.every, shards, view, on_best)
        # Of images with several labels none is a neighbour's to vote for.
        self._labels = np.full(len(shards), -1) if shards.multilabel else shards.labels
        self.chosen, self.labelled = choose(self._labels, config.images)
        self.k = config.k
        if not self.labelled:
            none = "several labels for each image" if shards.multilabel else "no labels"
            lack = "too few labels" if (self._labels >= 0).any() else none
            logger.info("%s: only RankMe is watched, and no best step is kept", lack)
            return
        sizes = np.unique(self._labels[self.chosen], return_counts=True)[1]
        usual = int(np.median(sizes[sizes > 1]))
        if self.k >= usual:  # its own class could never outvote the others
            logger.info(
                "monitor.k: classes have %d images here, so %d neighbours vote, not %d", usual, usual - 1, self.k
            )
            self.k = usual - 1

    def _judge(self, found: dict[str, float], step: int) -> dict[str, float]:
        """Compare with the floor and the best so far."""
        if "knn" not in found:
            return {}
        knn, seen, was_low = found["knn"], self.seen, self.seen.alarm
        seen.last = knn
        if step == 0:
            seen.floor = knn
        if seen.best is None or knn > seen.best:
            seen.best, seen.best_step = knn, step
            if step and self.on_best is not None:  # step 0 is only what the run started from
                self.on_best()
        if seen.alarm and not was_low:
            logger.warning(
                "step %d: kNN %.1f %% is below the floor of %.1f %%, that of the backbone at step 0; a point or so can "
                "be chance on %d images; if it stays there, lower optim.lr or give a longer objective.head_warmup",
                *(step, knn, seen.floor, len(self.chosen)),
            )
        return {"knn_alarm": 1} if seen.alarm else {}

    def measure(self, vit: ViT, precision: Precision = "auto") -> dict[str, float]:
        """`rankme`, and `knn` where labels are known: leave-one-out top-1 in percent on the class token.

        The model is run in eval mode without gradients where it lies, and left in the modes it was in.

        Raises:
            DataError: one of the images cannot be read.
            TrainingError: the features are not finite.
        """
        with evaluating(vit):
            features = self._extract(vit, precision)
        if not features.cls.isfinite().all():
            raise TrainingError(
                "the backbone's features are NaN or infinite; lower optim.lr or set loop.precision to fp32, "
                "and start in another folder"
            )
        measured = {"rankme": rankme(features)}
        if self.labelled:
            measured["knn"] = self._knn(features)
        return measured

    @cached_property
    def _images(self) -> Tensor:
        """Decoded and cut once: uint8 (N, C, size, size)."""
        return crops(self._shards, self._view, [Key(0, 0, int(at)) for at in self.chosen])["image"]

    # Not inference_mode: what a model remembers from one pass to the next must still serve training.
    @torch.no_grad()
    def _extract(self, vit: ViT, precision: Precision) -> Features:
        device = next(vit.parameters()).device
        cls, mean = [], []
        for images in self._images.split(_AT_ONCE):
            batch = self._view.finish({"image": images.to(device)})
            with autocast(device, precision):
                tokens = vit.features(batch["image"])
            cls.append(tokens.cls.float().cpu())
            mean.append(tokens.mean.float().cpu())
        labels = torch.from_numpy(self._labels[self.chosen]).long()
        return Features(torch.cat(cls), torch.cat(mean), labels, self._shards.classes, self._shards.fingerprint)

    def _knn(self, features: Features) -> float:
        judge = KNN(k=(self.k,), leave_one_out=True)
        found = judge.predict(features, None, features.labels.unique(), judge.k)[0]
        return 100 * float((found == features.labels).double().mean())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for the time being; then each part is again in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def choose(labels: np.ndarray, images: int) -> tuple[np.ndarray, bool]:
    """Which images to watch, by a rule without chance: sorted numbers (N,), and whether their labels can judge.

    Where enough images of at least two classes are labelled: of each class the same number, evenly spaced
    through its images in the order of the shards; small classes give all they have, and their rest goes to the
    others. If there are more classes than leave 5 images for each, only some, evenly spaced by label, take part.
    Otherwise, as where not even two classes give two images: evenly spaced through the whole set.
    """
    wanted = min(images, len(labels))
    unjudged = _spaced(np.arange(len(labels)), wanted), False
    labelled = np.flatnonzero(labels >= 0)
    known = np.unique(labels[labelled])
    if len(known) < 2 or len(labelled) < wanted:
        return unjudged
    members = [labelled[labels[labelled] == label] for label in _spaced(known, max(2, images // _A_CLASS))]
    sizes = np.array([len(own) for own in members])
    level = int(max(level for level in range(min(sizes.max(), images) + 1) if np.minimum(sizes, level).sum() <= images))
    shares = np.minimum(sizes, level)
    larger = np.flatnonzero(sizes > level)
    shares[_spaced(larger, images - int(shares.sum()))] += 1
    if (shares > 1).sum() < 2:
        return unjudged
    chosen = [_spaced(own, int(share)) for own, share in zip(members, shares, strict=True)]
    return np.sort(np.concatenate(chosen)), True


def _spaced(values: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the values, evenly spaced."""
    count = min(count, len(values))
    return values[(np.arange(count) * len(values)) // max(1, count)]
