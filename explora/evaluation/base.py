"""What an evaluator is, what it yields, and how sure a number over N images is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from explora.config import Config
from explora.errors import DataError
from explora.evaluation.features import Features

DRAWS: Final = 2000
"""Bootstrap samples behind every interval over images."""


@dataclass(frozen=True)
class Result:
    """One number about a backbone: `value` in percent with its 95 % interval over `n` test images.

    `scores` (n,) float64 in [0, 1] is the score of each image, for paired comparisons; `predictions` (n,)
    int64 its predicted label, where there is one; `selected` names what was chosen on validation images;
    `calibration` says how far stated probabilities are from true ones, where the evaluator states any.
    """

    evaluator: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    selected: dict[str, Any]
    scores: np.ndarray
    predictions: np.ndarray | None = None
    calibration: Mapping[str, float] | None = None

    @classmethod
    def over(
        cls,
        evaluator: str,
        scores: np.ndarray,
        selected: dict[str, Any],
        predictions: np.ndarray | None = None,
        metric: str = "top1",
        calibration: Mapping[str, float] | None = None,
    ) -> Result:
        """The mean of per-image scores (n,) in [0, 1], with its bootstrap interval."""
        scores = np.asarray(scores, dtype=np.float64)
        low, high = interval(scores)
        value = 100 * float(scores.mean())
        return cls(evaluator, metric, value, low, high, len(scores), selected, scores, predictions, calibration)


class Evaluator(Config):
    """One way to tell what a frozen backbone is worth; picked in YAML by `name:`."""

    name: str
    """Picks the evaluator; subclasses make it a `Literal`."""

    @property
    def label(self) -> str:
        """What its results are called; results of one label are compared from model to model."""
        return self.name

    @property
    def within_test(self) -> bool:
        """Whether it looks at test images alone, judging each by others of them: some do by their field `held_out`."""
        return False

    @property
    def multilabel(self) -> bool:
        """Whether it is for images with any number of labels each, instead of one."""
        return False

    @property
    def fair_after_labels(self) -> bool:
        """Whether it can judge a backbone that has learnt the labels of `train` and `val`.

        Scoring those images, or learning anew from few of them, would flatter such a backbone.
        """
        return True

    @abstractmethod
    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        """Fit on `train`, choose on `val`, score on `test`.

        Raises:
            DataError: labels are missing, do not match, or do not suffice.
        """


def known_classes(train: Features, *others: Features) -> Tensor:
    """The sorted labels (C,) that `train` holds, after refusing what cannot be scored with them.

    Raises:
        DataError: no images, missing labels, fewer than 2 classes, other class names or a class that `train`
            lacks in `others`, or features that are not finite.
    """
    for features in (train, *others):
        _refuse_unusable(features)
        if features.classes != train.classes:
            raise DataError(
                "the training and test images name different classes: "
                f"{_names(train.classes)} and {_names(features.classes)}; pack both from the same folders"
            )
    known = train.labels.unique()
    if len(known) < 2:
        raise DataError("the training images hold fewer than 2 classes, so there is nothing to tell apart")
    for features in others:
        absent = features.labels[~torch.isin(features.labels, known)].unique().tolist()
        if absent:
            shown = _names([train.classes[label] if train.classes else str(label) for label in absent])
            raise DataError(f"no training image of class {shown}; add some, or leave the class out of the test")
    return known


def encode(known: Tensor, labels: Tensor) -> Tensor:
    """Labels (N,) as places (N,) in the sorted `known` (C,)."""
    return torch.searchsorted(known, labels)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of equal entries, in percent."""
    return 100 * float((predictions == labels).double().mean())


def interval(scores: np.ndarray, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval, in percent, of the mean of scores (n,) over images.

    Source: Efron 1979. It covers the choice of test images, not the seeds of any training.
    """
    scores = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(draws)]
    low, high = 100 * np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired(scores_a: np.ndarray, scores_b: np.ndarray) -> tuple[float, float, float]:
    """Mean of a - b over the same images, in percent points, with its 95 % bootstrap interval.

    Raises:
        DataError: the two hold different numbers of images.
    """
    if len(scores_a) != len(scores_b):
        raise DataError(f"cannot pair scores of {len(scores_a)} images with scores of {len(scores_b)}")
    difference = np.asarray(scores_a, dtype=np.float64) - np.asarray(scores_b, dtype=np.float64)
    return 100 * float(difference.mean()), *interval(difference)


def _refuse_unusable(features: Features) -> None:
    if len(features) == 0:
        raise DataError("one of the training, validation and test sets is empty; give more labelled images")
    if features.labels.ndim != 1:
        raise DataError("these images have several labels each; judge them with logreg_multi or knn_multi")
    unlabelled = int((features.labels < 0).sum())
    if unlabelled:
        raise DataError(
            f"{unlabelled} of {len(features)} images have no label; evaluation needs one folder per class, "
            "or another data set with labels"
        )
    if not (features.cls.isfinite().all() and features.mean.isfinite().all()):
        raise DataError("the features hold NaN or infinity; check the weights, or extract them with precision fp32")


def _names(names: list[str] | None) -> str:
    if names is None:
        return "no names"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
