"""Results whose value is no mean over images, such as micro-mAP and mIoU: what drawing the images anew makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from explora.errors import DataError
from explora.evaluation.base import Result, paired

DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Resampled(Result):
    """One number that no image has a share of, so `scores` is empty: its interval comes from bootstrap samples.

    `draws` (R,) float64 is the value, in percent, on each bootstrap sample of the images; sample r of n images is the
    same for all models. `others` are further numbers about the same predictions and `per_class` those of single
    classes, by name, all in percent.
    """

    draws: np.ndarray
    others: Mapping[str, float]
    per_class: Mapping[str, float]

    @classmethod
    def drawn(
        cls,
        evaluator: str,
        metric: str,
        measure: Callable[[np.ndarray], float],
        n: int,
        selected: dict[str, Any],
        *,
        others: Mapping[str, float],
        per_class: Mapping[str, float],
    ) -> Resampled:
        """A result over n images with its 95 % percentile bootstrap interval (Efron 1979).

        Args:
            measure: the value, in [0, 1], of a set in which image i stands counts[i] times, int64 (n,); NaN where it
                is not defined, which leaves the sample out.
        """
        value = 100 * measure(np.ones(n, np.int64))
        draws = 100 * np.array([measure(counts) for counts in resamples(n)])
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        return cls(
            *(evaluator, metric, value, float(low), float(high), n, selected, np.empty(0)),
            draws=draws,
            others={name: 100 * share for name, share in others.items()},
            per_class={name: 100 * share for name, share in per_class.items()},
        )


def resamples(n: int, draws: int = DRAWS, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of n images stands in each bootstrap sample, int64 (n,): a function of n and the seed alone."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield np.bincount(rng.integers(0, n, n), minlength=n)


def difference(a: Result, b: Result) -> tuple[float, float, float]:
    """a - b over the same images, in percent points, with its 95 % paired bootstrap interval.

    Every bootstrap sample of images is scored for both, so what the two have in common cancels out.

    Raises:
        DataError: the two are about different metrics or numbers of images.
    """
    if (a.metric, a.n) != (b.metric, b.n):
        raise DataError(f"cannot compare {a.metric} of {a.n} images with {b.metric} of {b.n}; score the same images")
    if not (isinstance(a, Resampled) and isinstance(b, Resampled)):
        return paired(a.scores, b.scores)
    low, high = np.nanpercentile(a.draws - b.draws, [2.5, 97.5])
    return a.value - b.value, float(low), float(high)
