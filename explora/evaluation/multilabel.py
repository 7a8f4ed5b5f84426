"""Evaluators and scores for images with several labels each: one-vs-rest regression, neighbours, average precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from explora.errors import DataError
from explora.evaluation.base import Evaluator, Result
from explora.evaluation.features import Features
from explora.evaluation.knn import Neighbours
from explora.evaluation.logreg import Chosen, Problem, Sweep
from explora.evaluation.resampling import Resampled

_CELLS_AT_ONCE = 2**24


class MultiLabelLogReg(Sweep, Evaluator):
    """One L2-regularised logistic regression per class, one C for all of them by micro-mAP, refit on train + val.

    It yields micro-mAP and, as `logreg_multi_lrap`, label-ranking average precision, which images have a share in.
    """

    name: Literal["logreg_multi"] = "logreg_multi"
    """Picks this evaluator."""

    @property
    def multilabel(self) -> bool:
        return True

    def problem(self, features: Features, known: Tensor) -> OneVsRest:
        """Logistic regressions of the classes at `known` (C,) on features as they are."""
        return OneVsRest(features.matrix(self.blocks, self.avgpool), features.labels[:, known])

    def choose(self, train: Features, val: Features, known: Tensor) -> Chosen:
        """The fit on `train`, and its C, with the largest micro-mAP, in percent, on `val`; of equals the smallest C."""
        x_val, y_val = val.matrix(self.blocks, self.avgpool), val.labels[:, known].numpy()
        path = self.problem(train, known).path(self.values)
        found = [Chosen(c, 100 * micro_map(fit.logits(x_val).numpy(), y_val), fit) for c, fit in path]
        return max(found, key=lambda one: one.accuracy)

    def selected(self, chosen: Chosen) -> dict[str, Any]:
        """What a result says of the choice."""
        said = super().selected(chosen)
        return {"val_micro_map" if name == "val_accuracy" else name: value for name, value in said.items()}

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        _refuse_unusable(train, val, test)
        both = train.join(val)
        known = _shown(both, test)
        chosen = self.choose(train, val, _shown(train))
        logits = self.problem(both, known).solve(chosen.c).logits(test.matrix(self.blocks, self.avgpool))
        targets, names = test.labels[:, known].numpy(), _names(test, known)
        yield from scored(self.label, logits.numpy(), targets, names, self.selected(chosen))


class OneVsRest(Problem):
    """min over W, b of C * sum of binary cross-entropies + ||W||^2 / 2 for x (N, D), targets (N, C); b is free.

    The classes are problems of their own that share their passes over x.
    """

    def __init__(self, x: Tensor, targets: Tensor) -> None:
        super().__init__(x, targets, targets.shape[1])
        self._y = targets.T.to(self._x.dtype)

    def _cross_entropy(self, weight: Tensor, bias: Tensor) -> tuple[float, Tensor]:
        """Sum over classes of their mean cross-entropy under weight (C, K), bias (C, 1), and derivatives (C, K + 1)."""
        loss, slope = 0.0, torch.zeros(len(weight), weight.shape[1] + 1, dtype=torch.float64)
        for x, y in self._pieces():
            log_odds = torch.addmm(bias, weight, x.T)
            # where it is linear to the last bit of float64, and no earlier
            loss += float((softplus(log_odds, threshold=36) - y * log_odds).sum())
            error = log_odds.sigmoid_().sub_(y)
            slope[:, :-1] += error @ x
            slope[:, -1] += error.sum(1)
        return loss / len(self._x), slope.div_(len(self._x))


class MultiLabelKNN(Neighbours, Evaluator):
    """k nearest neighbours by cosine similarity of the last class token: a class scores its share of their votes.

    It yields micro-mAP and, as `knn_multi_lrap`, label-ranking average precision, which images have a share in.
    """

    name: Literal["knn_multi"] = "knn_multi"
    """Picks this evaluator."""

    @property
    def multilabel(self) -> bool:
        return True

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        _refuse_unusable(train, val, test)
        bank = train.join(val)
        known = _shown(bank, test)
        selected: dict[str, Any] = {"k": self.fitting(len(bank))[0]}
        if len(self.k) > 1:
            candidates = self.fitting(len(train))
            found = [micro_map(votes, val.labels.numpy()) for votes in self.votes(train, val, candidates)]
            selected = {"k": candidates[int(np.argmax(found))], "val_micro_map": 100 * max(found)}
        votes = self.votes(bank, test, [selected["k"]])[0]
        targets, names = test.labels[:, known].numpy(), _names(test, known)
        yield from scored(self.label, votes[:, known.numpy()], targets, names, selected, threshold=0.5)

    def votes(self, bank: Features, queries: Features, k: Sequence[int]) -> np.ndarray:
        """Share of the votes (len(k), N, C), in [0, 1], that each class gets; equally near ones in the bank's order."""
        labels, found = bank.labels.float(), []
        for nearest, weights in self.neighbours(bank, queries, max(k)):
            for first in k:
                ballots = torch.zeros(len(nearest), len(labels)).scatter_(1, nearest[:, :first], weights[:, :first])
                found.append(ballots @ labels / weights[:, :first].sum(1, keepdim=True))
        return torch.stack([torch.cat(found[place :: len(k)]) for place in range(len(k))]).numpy()


def micro_map(scores: np.ndarray, targets: np.ndarray) -> float:
    """Average precision, in [0, 1], of all (image, class) pairs in one ranking: scores (N, C), targets (N, C) of 0, 1.

    Pairs of equal score enter together: the sum over thresholds of (recall gained) x precision, without interpolation,
    as scikit-learn has it.

    Raises:
        DataError: no image shows any class.
    """
    _refuse_nothing(targets)
    return Ranking(scores, targets).average_precision(np.ones(len(scores), np.int64))


def macro_map(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes that some image shows of their average precision, in [0, 1]; as for `micro_map`."""
    _refuse_nothing(targets)
    return float(np.nanmean(class_precisions(scores, targets)))


def class_precisions(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Average precision (C,), in [0, 1], of each class; NaN where no image shows it."""
    whole = np.ones(len(scores), np.int64)
    columns = range(scores.shape[1])
    return np.array([Ranking(scores[:, [c]], targets[:, [c]]).average_precision(whole) for c in columns])


def micro_f1(predicted: np.ndarray, targets: np.ndarray) -> float:
    """F1, in [0, 1], over all (image, class) pairs (N, C); 1 where no class is predicted or shown at all."""
    either = int(predicted.sum()) + int(targets.sum())
    return 2 * int((predicted & (targets > 0)).sum()) / either if either else 1.0


def lrap(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Label-ranking average precision (N,), in [0, 1], of each image's scores (N, C) for its classes (N, C).

    For each class of an image: the share of its own among all classes that score as high; then their mean. An image of
    no class or of all scores 1, as in scikit-learn. Source: Schapire and Singer 2000; Tsoumakas et al. 2010.
    """
    found, step = [], max(1, _CELLS_AT_ONCE // scores.shape[1] ** 2)
    for first in range(0, len(scores), step):
        values, own = scores[first : first + step], targets[first : first + step] > 0
        above = values[:, None, :] >= values[:, :, None]
        precision = (above & own[:, None, :]).sum(2) / above.sum(2)
        counts = own.sum(1)
        found.append(np.where(counts > 0, (precision * own).sum(1) / np.maximum(counts, 1), 1.0))
    return np.concatenate(found)


def scored(
    label: str,
    scores: np.ndarray,
    targets: np.ndarray,
    names: Sequence[str],
    selected: dict[str, Any],
    threshold: float = 0.0,
) -> Iterator[Result]:
    """Micro-mAP, with macro-mAP, micro-F1 and each class's own, then LRAP as a result called `<label>_lrap`.

    Args:
        scores: (N, C), comparable from class to class, such as log-odds.
        targets: (N, C), 1 where an image shows a class.
        names: of the C classes.
        threshold: a class that scores more is predicted, for the F1.

    Raises:
        DataError: no image shows any class.
    """
    _refuse_nothing(targets)
    precisions = class_precisions(scores, targets)
    yield Resampled.drawn(
        *(label, "micro_map", Ranking(scores, targets).average_precision, len(scores), selected),
        others={"macro_map": macro_map(scores, targets), "micro_f1": micro_f1(scores > threshold, targets)},
        per_class={name: p for name, p in zip(names, precisions.tolist(), strict=True) if not np.isnan(p)},
    )
    yield Result.over(f"{label}_lrap", lrap(scores, targets), selected, metric="lrap")


class Ranking:
    """All (image, class) pairs of scores (N, C) and targets (N, C) by falling score: one sort for many bootstraps."""

    def __init__(self, scores: np.ndarray, targets: np.ndarray) -> None:
        flat = np.asarray(scores).ravel()
        order = np.argsort(-flat, kind="stable")
        self._images = order // scores.shape[1]
        self._true = np.asarray(targets).ravel()[order] > 0
        last = np.append(np.diff(flat[order]) != 0, True)
        self._ends = np.flatnonzero(last)

    def average_precision(self, counts: np.ndarray) -> float:
        """Average precision where image i stands counts[i] times, (N,); NaN where nothing is true."""
        weights = counts[self._images]
        seen = np.cumsum(weights)[self._ends]
        hits = np.cumsum(weights * self._true)[self._ends]
        if hits[-1] == 0:
            return float("nan")
        gained = np.diff(hits, prepend=0)
        return float((gained * (hits / np.maximum(seen, 1))).sum() / hits[-1])


def _shown(taught: Features, *asked: Features) -> Tensor:
    """Places (C,) of the classes that the images to learn from show; those asked about may show no other."""
    shown = taught.labels.bool().any(0)
    if not shown.any():
        raise DataError("none of the training images shows any class; give more labelled images")
    for features in asked:
        absent = (features.labels.bool().any(0) & ~shown).nonzero().flatten()
        if len(absent):
            names = ", ".join(_names(features, absent[:5]))
            raise DataError(f"no training image of class {names}; add some, or leave the class out of the test")
    return shown.nonzero().flatten()


def _refuse_unusable(train: Features, *others: Features) -> None:
    for features in (train, *others):
        if not features.multilabel:
            raise DataError("these images have one label each; logreg_multi and knn_multi are for several: use logreg")
        if len(features) == 0:
            raise DataError("one of the training, validation and test sets is empty; give more labelled images")
        if features.classes != train.classes or features.labels.shape[1] != train.labels.shape[1]:
            raise DataError("the training and test images name different classes; pack both with the same list")
        if not (features.cls.isfinite().all() and features.mean.isfinite().all()):
            raise DataError("the features hold NaN or infinity; check the weights, or extract them with precision fp32")


def _refuse_nothing(targets: np.ndarray) -> None:
    if not (targets > 0).any():
        raise DataError("none of the images to score shows any class that was learnt; give more labelled images")


def _names(features: Features, places: Tensor) -> list[str]:
    return [features.classes[place] if features.classes else str(place) for place in places.tolist()]
