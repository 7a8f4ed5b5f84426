"""What a row of tasks comes to: accuracy after each of them, and what was forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from torch import Tensor

from explora.errors import DataError


def accuracy(predictions_N: Tensor, labels_N: Tensor) -> float:
    """Share of equal entries, in percent.

    Raises:
        DataError: there are none.
    """
    if len(labels_N) == 0:
        raise DataError("a task without test images has no accuracy; add labelled test images of its classes")
    return 100 * float((predictions_N == labels_N).double().mean())


@dataclass(frozen=True)
class Progression:
    """`accuracy[t][i]`: percent on the test images of task i after task t, i = 0 to t; at least one row."""

    accuracy: Sequence[Sequence[float]]

    @property
    def average(self) -> float:
        """Mean over tasks after the last one."""
        return fmean(self.accuracy[-1])

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of the best accuracy ever minus the final one, percent points.

        Source: Chaudhry et al. 2018 (arXiv 1801.10112), with the final accuracy among those that may be best, so
        that it is never negative. 0 after a single task.
        """
        final = self.accuracy[-1]
        drops = [max(row[i] for row in self.accuracy[i:]) - final[i] for i in range(len(final) - 1)]
        return fmean(drops) if drops else 0.0

    @property
    def average_incremental(self) -> float:
        """Mean, over the ends of all tasks, of the mean over the tasks so far. Source: Rebuffi et al. 2017, iCaRL."""
        return fmean(fmean(row) for row in self.accuracy)


def interval(correct: Sequence[Tensor], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval, in percent, of the mean over tasks of their accuracies.

    Test images are drawn anew within each task. How many of n such draws are right is binomial(n, accuracy), so
    that is what is drawn. It covers the choice of test images, not the seeds of any training.

    Args:
        correct: for each task, whether each of its test images was right, (N_i,) bool.

    Raises:
        DataError: a task without test images.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([len(task) for task in correct])
    if not sizes.all():
        raise DataError("a task without test images has no accuracy; add labelled test images of its classes")
    shares = np.array([float(task.double().mean()) for task in correct])
    means = (rng.binomial(sizes, shares, (draws, len(sizes))) / sizes).mean(1)
    low, high = 100 * np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
