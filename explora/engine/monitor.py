"""What the backbone's features are worth while it learns: kNN and effective rank on the same few images each time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from explora.config import Config
from explora.data import Center, Key, ShardSet
from explora.distributed import Precision, autocast
from explora.errors import TrainingError
from explora.evaluation import KNN, Features, rankme
from explora.models import ViT
from explora.schedules import Length, LengthField

logger = logging.getLogger("explora")

_AT_ONCE = 64
_A_CLASS = 5
"""Fewer images of a class than these leave too few neighbours of it to vote."""


class MonitorConfig(Config):
    """How the backbone's features are watched during training."""

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


class Monitor:
    """Measures a backbone on a fixed part of the training images; draws nothing at random, changes nothing.

    Args:
        shards: the images to choose from; their labels judge, they never teach.
        view: how an image is cut and normalised.
        on_best: called when a measurement after the start has a better kNN than all before it.
    """

    def __init__(
        self, config: MonitorConfig, shards: ShardSet, view: Center, on_best: Callable[[], None] | None = None
    ) -> None:
        self.config, self.on_best = config, on_best
        self._shards, self._view = shards, view
        self.chosen, self.labelled = choose(shards.labels, config.images)
        self.k = config.k
        if not self.labelled:
            lack = "too few labels" if (shards.labels >= 0).any() else "no labels"
            logger.info("%s: only RankMe is watched, and no best step is kept", lack)
            return
        sizes = np.unique(shards.labels[self.chosen], return_counts=True)[1]
        usual = int(np.median(sizes[sizes > 1]))
        if self.k >= usual:  # its own class could never outvote the others
            logger.info(
                "monitor.k: classes have %d images here, so %d neighbours vote, not %d", usual, usual - 1, self.k
            )
            self.k = usual - 1

    def measure(self, vit: ViT, precision: Precision = "auto") -> dict[str, float]:
        """`rankme`, and `knn` where labels are known: leave-one-out top-1 in percent on the class token.

        The model is run in eval mode without gradients where it lies, and left in the modes it was in.

        Raises:
            DataError: one of the images cannot be read.
            TrainingError: the features are not finite.
        """
        modes = [(module, module.training) for module in vit.modules()]
        vit.eval()
        try:
            features = self._extract(vit, precision)
        finally:
            for module, mode in modes:
                module.training = mode
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
        """Decoded and cut once: uint8 (N, 3, size, size)."""
        samples = (self._view.sample(self._shards.image(int(at)), Key(0, 0, int(at))) for at in self.chosen)
        return torch.stack([sample["image"] for sample in samples])

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
        labels = torch.from_numpy(self._shards.labels[self.chosen]).long()
        return Features(torch.cat(cls), torch.cat(mean), labels, self._shards.classes, self._shards.fingerprint)

    def _knn(self, features: Features) -> float:
        judge = KNN(k=(self.k,), leave_one_out=True)
        found = judge.predict(features, None, features.labels.unique(), judge.k)[0]
        return 100 * float((found == features.labels).double().mean())


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
