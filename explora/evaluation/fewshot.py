"""Few-shot accuracy: logistic regression on a handful of images per class, averaged over draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from explora.evaluation.base import Evaluator, Result, encode, known_classes
from explora.evaluation.features import Features, few_shot
from explora.evaluation.logreg import Problem


class FewShot(Evaluator):
    """Mean accuracy of classifiers on the class token, each fitted to another `shots` images per class.

    Images are drawn from train and val by seed and label alone, so all backbones see the same ones. The
    interval covers the choice of test images, not of the draws. Few points are nearly always separable, and
    from C = 10 on the classifier is close to the one of widest margin, whatever the number of shots.
    """

    name: Literal["fewshot"] = "fewshot"
    """Picks this evaluator."""
    shots: int = Field(default=5, ge=1)
    """Images per class to learn from."""
    draws: int = Field(default=10, ge=1)
    """How many times to draw them anew."""
    C: float = Field(default=10.0, gt=0)
    """Inverse strength of the L2 penalty, for features of unit mean square distance from their mean."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def label(self) -> str:
        return f"{self.name}_{self.shots}"

    @property
    def fair_after_labels(self) -> bool:
        return False

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        known = known_classes(train, val, test)
        both = train.join(val)
        x_test, correct = test.matrix(), np.zeros(len(test))
        for draw in range(self.draws):
            few = both.take(few_shot(both.labels, self.shots, self.seed * self.draws + draw))
            x = few.matrix()
            # one C for every backbone needs one scale: dividing x by s is the same as dividing C by s^2
            spread = float((x - x.mean(0)).double().square().sum(1).mean())
            fit = Problem(x, encode(known, few.labels), len(known)).solve(self.C / max(spread, 1e-12))
            correct += (known[fit.predict(x_test)] == test.labels).numpy()
        selected = {"shots": self.shots, "draws": self.draws, "C": self.C}
        yield Result.over(self.label, correct / self.draws, selected)
