"""Rows of results.jsonl as values: what was measured, on which data, for which models, in reading order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

DATA = ("target", "segmentation", "source", "control")
"""What rows are about, in reading order."""
GAINS = ("target", "segmentation")
"""Where a model is to gain."""
PRICES = ("source", "control")
"""What stands beside every gain."""


class Column(NamedTuple):
    """What is measured: one evaluator, by its label, and one of its metrics."""

    evaluator: str
    metric: str


@dataclass(frozen=True)
class Row:
    """One row of `results.jsonl`; values in percent, `difference` paired to the first model."""

    model: str
    data: str
    evaluator: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    selected: Mapping[str, Any] | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    cosine_drift: float | None = None
    cka: float | None = None
    weight_distance: float | None = None
    """Relative Frobenius distance of the backbone's weights from the first model's."""
    block_distances: Sequence[float] | None = None
    """The same block by block, of the blocks that both have."""
    groups: Mapping[str, Any] | None = None
    """By what images are grouped, the worst group and all of them, each with its name, n, value, low and high."""
    calibration: Mapping[str, float] | None = None
    """How far stated probabilities are from true ones, in [0, 1], before and after temperature scaling."""
    others: Mapping[str, float] | None = None
    """Further metrics of the same predictions, in percent."""
    per_class: Mapping[str, float] | None = None
    """The metric class by class, in percent."""

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Row:
        """Read one row as the probe wrote it, where drift and CKA carry the data in their name.

        Raises:
            TypeError, ValueError: it is no row.
        """
        known = {field.name: raw[field.name] for field in fields(cls) if field.name in raw}
        moved = {name: raw.get(f"{raw.get('data')}_{name}") for name in ("cosine_drift", "cka")}
        row = cls(**{**known, **moved})
        _ = float(row.value), float(row.low), float(row.high), int(row.n)
        return row

    @property
    def column(self) -> Column:
        return Column(self.evaluator, self.metric)


@dataclass(frozen=True)
class Results:
    """Rows in reading order, which is that of the probe's config; the first model is what the others are compared with.

    So the first evaluator, which the headline takes, was declared before anything was measured.
    """

    rows: list[Row]
    models: list[str]

    @property
    def first(self) -> str:
        """The model that the others are compared with; empty without rows."""
        return self.models[0] if self.models else ""

    def on(self, data: str) -> list[Row]:
        """The rows measured on one of `DATA`."""
        return [row for row in self.rows if row.data == data]

    def columns(self, data: str) -> list[Column]:
        """What was measured on `data`, in reading order."""
        return list(dict.fromkeys(row.column for row in self.on(data)))

    def row(self, model: str, data: str, column: Column) -> Row | None:
        """The row of a model, or None where it was not measured."""
        return next((row for row in self.on(data) if row.model == model and row.column == column), None)

    def beside(self, model: str, data: str, column: Column) -> Row | None:
        """What `model` shows on other data, to stand beside `column`: the same evaluator, else the first one there."""
        columns = self.columns(data)
        return self.row(model, data, column if column in columns else columns[0]) if columns else None

    def left_out(self, model: str, data: str) -> list[Column]:
        """What the probe measured for the first model, but not for this one, as it had learnt the labels."""
        own = [row for row in self.on(data) if row.model == model]
        if data != "target" or all(row.evaluator != "head" for row in own):
            return []
        measured = {row.column for row in own}
        absent = [column for column in self.columns(data) if column not in measured]
        return [column for column in absent if self.row(self.first, data, column)]


def gather(rows: Iterable[Row]) -> Results:
    """Rows by (data, column, model); a row written again replaces the one before."""
    latest = {(row.model, row.data, row.column): row for row in rows}
    models = list(dict.fromkeys(row.model for row in latest.values()))
    columns = list(dict.fromkeys(row.column for row in latest.values()))
    places = {data: place for place, data in enumerate(DATA)}
    order = sorted(
        latest.values(),
        key=lambda r: (places.get(r.data, len(places)), r.data, columns.index(r.column), models.index(r.model)),
    )
    return Results(order, models)
