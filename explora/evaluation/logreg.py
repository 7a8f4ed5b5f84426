"""Multinomial logistic regression by L-BFGS in float64, its L2 penalty chosen on validation images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import minimize
from torch import Tensor

from explora.evaluation.base import Evaluator, Result, accuracy, encode, known_classes
from explora.evaluation.features import Features


class LogisticRegression(Evaluator):
    """L2-regularised logistic regression on features as they are; C from 10^-6 to 10^5, refit on train + val.

    Source: Oquab et al. 2023 (DINOv2), logistic-regression evaluation.
    """

    name: Literal["logreg"] = "logreg"
    """Picks this evaluator."""
    grid: int = Field(default=12, ge=1)
    """How many values of C, evenly spaced in the exponent (DINOv2: 45)."""
    blocks: int = Field(default=1, ge=1)
    """How many last blocks give their class token."""
    avgpool: bool = False
    """Whether the mean patch token joins the class tokens."""

    def evaluate(self, train: Features, val: Features, test: Features) -> Iterator[Result]:
        known = known_classes(train, val, test)
        x_val, y_val = val.matrix(self.blocks, self.avgpool), encode(known, val.labels)
        problem = Problem(train.matrix(self.blocks, self.avgpool), encode(known, train.labels), len(known))
        path: list[tuple[float, float, Fit]] = []
        start = None
        for c in np.logspace(-6, 5, self.grid).tolist():
            start = problem.solve(c, start)
            path.append((accuracy(start.predict(x_val), y_val), c, start))
        best, c, start = max(path, key=lambda item: item[0])
        both = train.join(val)
        refit = Problem(both.matrix(self.blocks, self.avgpool), encode(known, both.labels), len(known))
        predictions = known[refit.solve(c, start).predict(test.matrix(self.blocks, self.avgpool))]
        selected = {"C": c, "blocks": self.blocks, "avgpool": self.avgpool, "val_accuracy": best}
        yield Result.over(self.label, (predictions == test.labels).numpy(), selected, predictions.numpy())


class Fit(NamedTuple):
    """A fitted classifier: weight (D, C) and bias (C,), float64."""

    weight: np.ndarray
    bias: np.ndarray

    def predict(self, x: Tensor) -> Tensor:
        """Most likely class (N,) of x (N, D)."""
        return torch.from_numpy((x.double().numpy() @ self.weight + self.bias).argmax(axis=1))


class Problem:
    """min over W, b of C * sum of cross-entropies + ||W||^2 / 2 for x (N, D), y (N,); the bias is free.

    L-BFGS runs in the principal axes of x, each scaled to about unit curvature. Moving the origin only moves
    the free bias and turning the axes keeps ||W||: the same optimum, in far fewer iterations.
    """

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        x_ND = x.double().numpy()
        self._center = x_ND.mean(axis=0)
        centred = x_ND - self._center
        variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))
        # weights along axes without any variance are 0 at the optimum
        kept = variance > 1e-12 * max(variance[-1], np.finfo(np.float64).tiny)
        self._variance, self._axes = variance[kept], axes[:, kept]
        self._x = centred @ self._axes
        self._y = y.numpy()
        self._classes = classes

    def solve(self, c: float, start: Fit | None = None, max_iter: int = 1000) -> Fit:
        """The fit at penalty strength 1 / c, beginning from another fit of the same width if given."""
        rows, penalty = np.arange(len(self._x)), 1 / (c * len(self._x))
        scale = 1 / np.sqrt(self._variance / self._classes + penalty)
        x, shape = self._x * scale, (len(scale) + 1, self._classes)

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight, bias = flat.reshape(shape)[:-1], flat.reshape(shape)[-1]
            logits = x @ weight + bias
            logits -= logits.max(axis=1, keepdims=True)
            true = logits[rows, self._y]
            odds = np.exp(logits, out=logits)
            total = odds.sum(axis=1, keepdims=True)
            error = np.divide(odds, total, out=odds)
            shrunk = penalty * scale[:, None] ** 2 * weight
            loss = (np.log(total[:, 0]) - true).mean() + 0.5 * float((shrunk * weight).sum())
            error[rows, self._y] -= 1
            error /= len(x)
            return loss, np.vstack([x.T @ error + shrunk, error.sum(axis=0)]).ravel()

        first = np.zeros(shape)
        if start is not None:
            first[:-1] = self._axes.T @ start.weight / scale[:, None]
            first[-1] = start.bias + self._center @ start.weight
        options = {"maxiter": max_iter, "maxcor": 20, "gtol": 1e-7, "ftol": 1e-12}
        found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(shape)
        weight = self._axes @ (scale[:, None] * found[:-1])
        return Fit(weight, found[-1] - self._center @ weight)
