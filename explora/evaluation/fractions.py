"""Accuracy with a fraction of the labels: logistic regression on a stratified part of the images, over draws."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from explora.evaluation.base import Evaluator, Result, known_classes
from explora.evaluation.features import Features
from explora.evaluation.logreg import Sweep

logger = logging.getLogger("explora")


class LabelFraction(Sweep, Evaluator):
    """Mean accuracy of logistic regression fitted on a fraction of train and val, over draws of that fraction.

    A draw takes the fraction of each class, rounded, from train, at least one image, and from val. A fit on the drawn
    part of train is judged on all of val, which chooses C; at that C it is refit on both drawn parts. So the test
    images choose nothing, all of val's labels choose one number, and at fraction 1 this is `logreg`. Images are drawn
    by seed and label alone, so all backbones see the same ones. The interval covers the choice of test images, not
    of the draws, whose standard deviation is `std_over_draws` of `selected`. A fraction that is less than half an image
    a class is rounded up to more than it says: that is warned of, and `images` of `selected` counts those of a draw.
    """

    name: Literal["labels"] = "labels"
    """Picks this evaluator."""
    fraction: float = Field(default=0.1, gt=0, le=1)
    """Share of the labelled images of each class to learn from; in the label as a percentage."""
    draws: int = Field(default=5, ge=1)
    """How many times to draw them anew; all of them can be drawn only once."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def label(self) -> str:
        return f"{self.name}_{100 * self.fraction:g}%"

    @property
    def fair_after_labels(self) -> bool:
        return self.fraction == 1

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        known = known_classes(train, val, test)
        x_test, scores, chosen_c = test.matrix(self.blocks, self.avgpool), [], []
        draws = self.draws if self.fraction < 1 else 1
        for draw in range(draws):
            seed = self.seed * self.draws + draw
            few = train.take(stratified(train.labels, self.fraction, seed, at_least=1))
            chosen = self.choose(few, val, known)
            more = val.take(stratified(val.labels, self.fraction, seed, at_least=0))
            both = few.join(more)
            fit = self.problem(both, known).solve(chosen.c, chosen.fit)
            scores.append((known[fit.predict(x_test)] == test.labels).double().numpy())
            chosen_c.append(chosen.c)
        if len(few) > 2 * self.fraction * len(train):
            logger.warning(
                "%s: learns from %d images, one of each class at least, which is %.2g %% of the %d there are",
                *(self.label, len(both), 100 * len(both) / (len(train) + len(val)), len(train) + len(val)),
            )
        selected = {"fraction": self.fraction, "images": len(both), "draws": draws, "C": chosen_c, **self.range}
        selected["std_over_draws"] = spread([100 * float(one.mean()) for one in scores])
        yield Result.over(self.label, np.mean(scores, axis=0), selected)


def stratified(labels: Tensor, fraction: float, seed: int, at_least: int) -> Tensor:
    """Sorted indices of a share of each class in labels (N,), rounded, but no fewer than `at_least` images."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    drawn = []
    for label in labels.unique():
        members = order[labels[order] == label]
        drawn.append(members[: max(at_least, round(fraction * len(members)))])
    return torch.cat(drawn).sort().values


def spread(accuracies: Sequence[float]) -> float | None:
    """Standard deviation of the accuracies of draws, in percent points (n - 1 in the denominator); null for one."""
    return float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
