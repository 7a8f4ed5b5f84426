"""Multinomial logistic regression by L-BFGS in float64, its L2 penalty chosen on validation images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import cross_entropy

from explora.config import Config
from explora.evaluation.base import Evaluator, Result, accuracy, encode, known_classes
from explora.evaluation.calibration import calibration
from explora.evaluation.features import Features

_ROWS_AT_ONCE = 2048
"""Images whose features and logits stay in a core's cache between the two products of an iteration."""


class Sweep(Config):
    """Values of C to try, evenly spaced in the exponent, and what the classifier sees.

    Source: Oquab et al. 2023 (DINOv2), logistic-regression evaluation: 45 values from 10^-6 to 10^5.
    """

    c_range_start: float = Field(default=-6, ge=-12, le=12)
    """Exponent to 10 of the smallest C, the inverse strength of the L2 penalty."""
    c_range_stop: float = Field(default=5, ge=-12, le=12)
    """Exponent to 10 of the largest C."""
    grid: int = Field(default=12, ge=1)
    """How many values of C, evenly spaced in the exponent (DINOv2: 45)."""
    blocks: int = Field(default=1, ge=1)
    """How many last blocks give their class token."""
    avgpool: bool = False
    """Whether the mean patch token joins the class tokens."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.c_range_stop < self.c_range_start:
            raise ValueError("c_range_stop is below c_range_start; the sweep goes from the smallest C to the largest")
        return self

    @property
    def values(self) -> list[float]:
        """The values of C, from the smallest on."""
        return np.logspace(self.c_range_start, self.c_range_stop, self.grid).tolist()

    def problem(self, features: Features, known: Tensor) -> Problem:
        """Logistic regression on features as they are, of the sorted labels `known` (C,)."""
        return Problem(features.matrix(self.blocks, self.avgpool), encode(known, features.labels), len(known))

    def choose(self, train: Features, val: Features, known: Tensor) -> Chosen:
        """The fit on `train`, and its C, that is most often right on `val`; of equals that of the least loss there.

        The smallest C of equals would be right by probabilities that are nearly uniform.
        """
        x_val, y_val = val.matrix(self.blocks, self.avgpool), encode(known, val.labels)
        path = self.problem(train, known).path(self.values)
        found = []
        for c, fit in path:
            logits = fit.logits(x_val)
            found.append((accuracy(logits.argmax(1), y_val), -float(cross_entropy(logits, y_val)), c, fit))
        right, _, c, fit = max(found, key=lambda one: one[:2])
        return Chosen(c, right, fit)

    def selected(self, chosen: Chosen) -> dict[str, Any]:
        """What a result says of the choice."""
        return {"C": chosen.c, **self.range, "val_accuracy": chosen.accuracy}

    @property
    def range(self) -> dict[str, Any]:
        """The values of C and the input as results state them, in torchgeo-bench's names; val joins the refit."""
        swept = {"c_range_start": self.c_range_start, "c_range_stop": self.c_range_stop, "c_range_num": self.grid}
        return {**swept, "merge_val": True, "blocks": self.blocks, "avgpool": self.avgpool}


class LogisticRegression(Sweep, Evaluator):
    """L2-regularised logistic regression on features as they are; C from 10^-6 to 10^5, refit on train + val.

    Its calibration divides its logits by a temperature that comes from the fit on train alone at the same C, with the
    logits of validation images that it has not learnt from.

    Source: Oquab et al. 2023 (DINOv2), logistic-regression evaluation.
    """

    name: Literal["logreg"] = "logreg"
    """Picks this evaluator."""

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        known = known_classes(train, val, test)
        chosen = self.choose(train, val, known)
        refit = self.problem(train.join(val), known).solve(chosen.c, chosen.fit)
        val_logits = chosen.fit.logits(val.matrix(self.blocks, self.avgpool))
        logits = refit.logits(test.matrix(self.blocks, self.avgpool))
        predictions = known[logits.argmax(1)]
        yield Result.over(
            self.label,
            (predictions == test.labels).numpy(),
            self.selected(chosen),
            predictions.numpy(),
            calibration=calibration(val_logits, encode(known, val.labels), logits, encode(known, test.labels)),
        )


class Fit(NamedTuple):
    """A fitted classifier: weight (C, D) and bias (C,), float64."""

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, C) of x (N, D)."""
        return torch.addmm(self.bias, x.double(), self.weight.T)

    def predict(self, x: Tensor) -> Tensor:
        """Most likely class (N,) of x (N, D); of equally likely ones the first."""
        return self.logits(x).argmax(1)


class Chosen(NamedTuple):
    """The C with the best accuracy, in percent, on validation images, and the fit that had it."""

    c: float
    accuracy: float
    fit: Fit


class Problem:
    """min over W, b of C * sum of cross-entropies + ||W||^2 / 2 for x (N, D), y (N,); the bias is free.

    L-BFGS runs in the principal axes of x, each scaled to about unit curvature. Moving the origin only moves
    the free bias and turning the axes keeps ||W||: the same optimum, in far fewer iterations.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        x = x.double()
        self._center = x.mean(0)
        centred = x - self._center
        variance, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
        # weights along axes without any variance are 0 at the optimum
        kept = variance > 1e-12 * max(float(variance[-1]), np.finfo(np.float64).tiny)
        self._variance, self._axes = variance[kept], axes[:, kept]
        self._x, self._y, self._classes = centred @ self._axes, y[None], classes

    def solve(self, c: float, start: Fit | None = None, max_iter: int = 1000) -> Fit:
        """The fit at penalty strength 1 / c, beginning from another fit of the same width if given."""
        penalty = 1 / (c * len(self._x))
        scale = 1 / (self._variance / self._classes + penalty).sqrt()
        shrink, shape = penalty * scale**2, (self._classes, len(scale) + 1)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight, bias = torch.from_numpy(flat).view(shape).split([len(scale), 1], dim=1)
            loss, slope = self._cross_entropy(weight * scale, bias)
            slope[:, :-1] *= scale
            slope[:, :-1] += shrink * weight
            return loss + 0.5 * float((shrink * weight * weight).sum()), slope.numpy().ravel()

        first = torch.zeros(shape, dtype=torch.float64)
        if start is not None:
            first[:, :-1] = start.weight @ self._axes / scale
            first[:, -1] = start.bias + start.weight @ self._center
        options = {"maxiter": max_iter, "maxcor": 20, "gtol": 1e-7, "ftol": 1e-12}
        found = minimize(objective, first.numpy().ravel(), jac=True, method="L-BFGS-B", options=options).x
        weight, bias = torch.from_numpy(found).view(shape).split([len(scale), 1], dim=1)
        weight = weight * scale @ self._axes.T
        return Fit(weight, bias[:, 0] - weight @ self._center)

    def path(self, values: Iterable[float]) -> Iterator[tuple[float, Fit]]:
        """Each C of `values` and its fit, which begins from that of the C before."""
        fit = None
        for c in values:
            fit = self.solve(c, fit)
            yield c, fit

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows (M, K) of x at a time, and their columns (1 or C, M) of what is to be predicted."""
        return zip(self._x.split(_ROWS_AT_ONCE), self._y.split(_ROWS_AT_ONCE, dim=1), strict=True)

    def _cross_entropy(self, weight: Tensor, bias: Tensor) -> tuple[float, Tensor]:
        """Mean cross-entropy under weight (C, K), bias (C, 1), and its derivatives (C, K + 1)."""
        loss, slope = 0.0, torch.zeros(len(weight), weight.shape[1] + 1, dtype=torch.float64)
        true = -torch.ones(1, 1, dtype=torch.float64)
        for x, y in self._pieces():
            # images come last, so that the softmax over classes runs along contiguous memory
            log_odds = torch.addmm(bias, weight, x.T).log_softmax(0)
            loss -= float(log_odds.gather(0, y).sum())
            error = log_odds.exp_().scatter_add_(0, y, true.expand_as(y))
            slope[:, :-1] += error @ x
            slope[:, -1] += error.sum(1)
        return loss / len(self._x), slope.div_(len(self._x))
