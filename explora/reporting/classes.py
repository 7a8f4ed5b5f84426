"""Which classes are mixed up, which changed most against the baseline, and metrics class by class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from explora.reporting import figures
from explora.reporting.folder import Chain
from explora.reporting.rows import GAINS, Column

_MOST = 5
_MOST_CLASSES = 30
Line = tuple[str, list[float | None]]
"""A metric or class, and each model's value in percent."""


@dataclass(frozen=True)
class ByClass:
    """What one evaluator says beside its number: further metrics, and its metric class by class, rising most first."""

    data: str
    column: Column
    models: list[str]
    others: list[Line]
    classes: list[Line]
    left: int
    """Classes that changed less and are not shown."""


def by_class(chain: Chain) -> Iterator[ByClass]:
    """Of every evaluator that tells more than one number, the target's first."""
    for data in GAINS:
        for column in chain.columns(data):
            rows = [row for row in chain.on(data) if row.column == column and (row.others or row.per_class)]
            if rows:
                classes = sorted(_lines([row.per_class or {} for row in rows]), key=lambda line: -abs(_change(line)))
                shown = sorted(classes[:_MOST_CLASSES], key=_change, reverse=True)
                others = _lines([row.others or {} for row in rows])
                models = [row.model for row in rows]
                yield ByClass(data, column, models, others, shown, len(classes) - len(shown))


def _lines(each: list[Mapping[str, float]]) -> list[Line]:
    """Values of each model by name."""
    return [(name, [values.get(name) for values in each]) for name in dict.fromkeys(key for own in each for key in own)]


def _change(line: Line) -> float:
    """From the first model to the last, in points; 0 where one of them was not measured."""
    before, after = line[1][0], line[1][-1]
    return 0.0 if before is None or after is None else after - before


def confusion(chain: Chain) -> dict[str, Any] | None:
    """The adapted model on the target's test images, by the first evaluator with predictions, and what changed."""
    labels, names = chain.arrays.get("target__labels"), chain.classes or []
    for row in [row for row in chain.on("target") if row.model in chain.models[1:2] and row.metric == "top1"]:
        adapted = chain.arrays.get(f"{row.model}__target__{row.evaluator}")
        if labels is None or adapted is None or adapted.shape != labels.shape or not (labels >= 0).any():
            continue
        size = 1 + int(max(labels.max(), adapted.max()))
        names = names[:size] + [str(number) for number in range(len(names), size)]
        matrix = np.zeros((size, size), dtype=np.int64)
        known = (labels >= 0) & (adapted >= 0)
        np.add.at(matrix, (labels[known], adapted[known]), 1)
        before = chain.arrays.get(f"{chain.first}__target__{row.evaluator}")
        changed: list[dict[str, Any]] = []
        if before is not None and before.shape == labels.shape:
            changed = _changed(labels, before, adapted, names)
        svg, large = figures.confusion(matrix, names), size > figures.FEW_CLASSES
        return {"row": row, "svg": svg, "large": large, "changed": changed, "mixed": _mixed(matrix, names)}
    return None


def _changed(labels: np.ndarray, before: np.ndarray, after: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """Classes by change of correct images against the baseline: the most gained, then the most lost."""
    found: list[dict[str, Any]] = []
    for label, name in enumerate(names):
        own = labels == label
        if own.any():
            right, was = int((after[own] == label).sum()), int((before[own] == label).sum())
            change = {"before": was, "after": right, "change": right - was}
            found.append({"name": name, "n": int(own.sum()), **change})
    found.sort(key=lambda item: -item["change"])
    up = [item for item in found if item["change"] > 0][:_MOST]
    down = [item for item in found if item["change"] < 0][-_MOST:]
    return up + down


def _mixed(matrix: np.ndarray, names: list[str]) -> list[tuple[str, str, int]]:
    """The pairs (true, predicted) that are mixed up most."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST]
    pairs = [np.unravel_index(place, wrong.shape) for place in order]
    return [(names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]
