"""Few-shot accuracy: logistic regression on a handful of images per class, averaged over draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from explora.errors import DataError
from explora.evaluation.base import Evaluator, Result, encode, known_classes
from explora.evaluation.features import Features, few_shot
from explora.evaluation.fractions import spread
from explora.evaluation.logreg import Fit, Problem


class FewShot(Evaluator):
    """Mean accuracy of classifiers on the class token, each fitted to another `shots` images per class.

    Images are drawn from train and val by seed and label alone, so all backbones see the same ones. The
    interval covers the choice of test images, not of the draws, whose standard deviation is `std_over_draws` of
    `selected`. Few points are nearly always separable, and from C = 10 on the classifier is close to the one of widest
    margin, whatever the number of shots.
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
    held_out: bool = False
    """Whether they are drawn from the test images, the others of which judge: fair where labels of train are learnt."""

    @property
    def label(self) -> str:
        return f"{self.name}_{self.shots}{'_test' * self.held_out}"

    @property
    def within_test(self) -> bool:
        return self.held_out

    @property
    def fair_after_labels(self) -> bool:
        return self.held_out

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        if self.held_out:
            train = val = test  # nobody looks at the others
        known = known_classes(train, val, test)
        pool = test if self.held_out else train.join(val)
        x_test, correct, judged = test.matrix(), np.zeros(len(test)), np.zeros(len(test))
        accuracies: list[float] = []
        for draw in range(self.draws):
            drawn = few_shot(pool.labels, self.shots, self.seed * self.draws + draw)
            asked = np.ones(len(test), bool)
            if self.held_out:
                asked[drawn.numpy()] = False
            right = (known[self._fit(pool.take(drawn), known).predict(x_test)] == test.labels).numpy()
            correct += right & asked
            judged += asked
            accuracies += [100 * float(right[asked].mean())] if asked.any() else []
        if not judged.any():
            raise DataError(f"{self.label}: all test images are drawn to learn from; lower shots below {self.shots}")
        selected = {"shots": self.shots, "draws": self.draws, "C": self.C, "std_over_draws": spread(accuracies)}
        # an image that every draw took to learn from has no score of its own
        yield Result.over(self.label, correct[judged > 0] / judged[judged > 0], selected)

    def _fit(self, few: Features, known: Tensor) -> Fit:
        x = few.matrix()
        # one C for every backbone needs one scale: dividing x by s is the same as dividing C by s^2
        spread = float((x - x.mean(0)).double().square().sum(1).mean())
        return Problem(x, encode(known, few.labels), len(known)).solve(self.C / max(spread, 1e-12))
