"""Read the folder of a finished chain into plain values; a part that is absent becomes empty or None."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from explora.errors import RunError

MODELS = ("baseline", "adapted", "finetuned")
EVALUATORS = ("linear", "logreg", "knn", "fewshot", "head")
STAGES = ("pretrain", "finetune")


class Column(NamedTuple):
    """What is measured: one evaluator and one of its metrics."""

    evaluator: str
    metric: str


@dataclass(frozen=True)
class Row:
    """One row of `probe/results.jsonl`; values in percent, `difference` paired to the baseline."""

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

    @property
    def column(self) -> Column:
        return Column(self.evaluator, self.metric)


@dataclass(frozen=True)
class Stage:
    """One training stage: its summary, its logged steps and how many lines of them were torn."""

    name: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    torn: int
    config: str | None
    environment: dict[str, Any]


@dataclass(frozen=True)
class Chain:
    """Everything the report knows; rows in reading order, arrays and pictures as the probe left them."""

    path: Path
    rows: list[Row]
    stages: list[Stage]
    shards: dict[str, dict[str, Any]]
    classes: list[str] | None
    arrays: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    config: str | None
    environment: dict[str, Any]

    def on(self, data: str) -> list[Row]:
        """The rows measured on `target` or `source`."""
        return [row for row in self.rows if row.data == data]

    def columns(self, data: str) -> list[Column]:
        """What was measured on `data`, in reading order."""
        return sorted({row.column for row in self.on(data)}, key=_column_place)

    def row(self, model: str, data: str, column: Column) -> Row | None:
        """The row of a model, or None where it was not measured."""
        return next((row for row in self.on(data) if row.model == model and row.column == column), None)

    def data_name(self, data: str) -> str:
        """What the shards of `target` or `source` call themselves, else `the target data`."""
        keys = sorted((key for key in self.shards if key.startswith(data)), key=lambda key: (key != data, key))
        return str(self.shards[keys[0]].get("name", keys[0])) if keys else f"the {data} data"


def read_chain(run: Path) -> Chain:
    """Read what a chain left on disk (`docs/architecture.md`, "What a run leaves on disk").

    Raises:
        RunError: the folder is missing, is no chain, or one of its files cannot be read.
    """
    if not run.is_dir():
        raise RunError(f"{run}: no such folder; give the folder of a finished run")
    stages = [_stage(path.parent) for path in run.glob("*/summary.json") if path.parent.name != "probe"]
    results = run / "probe" / "results.jsonl"
    if not stages and not results.is_file():
        raise RunError(
            f"{run}: not the folder of a run: it holds neither probe/results.jsonl nor a stage with a "
            "summary.json; give the folder that `explora run` wrote, the one that holds pretrain/ and probe/"
        )
    return Chain(
        path=run,
        rows=_rows(results),
        stages=sorted(stages, key=lambda stage: _place(STAGES, stage.name)),
        shards={path.parent.name: _mapping(path) for path in sorted(run.glob("shards/*/manifest.json"))},
        classes=_classes(run / "probe" / "classes.json"),
        arrays=_arrays(run / "probe" / "predictions.npz"),
        pictures=_arrays(run / "probe" / "pictures.npz"),
        config=_text(run / "config.yaml"),
        environment=_mapping(run / "environment.json"),
    )


def _place(order: tuple[str, ...], name: str) -> tuple[int, str]:
    """Known names in their order, unknown ones after them by alphabet."""
    return (order.index(name) if name in order else len(order), name)


def _column_place(column: Column) -> tuple[Any, ...]:
    return (_place(EVALUATORS, column.evaluator), column.metric != "top1", column.metric)


def _stage(folder: Path) -> Stage:
    metrics, torn = _metrics(folder / "metrics.jsonl")
    config, environment = _text(folder / "config.yaml"), _mapping(folder / "environment.json")
    return Stage(folder.name, _mapping(folder / "summary.json"), metrics, torn, config, environment)


def _text(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot read this file: {error}") from None


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return None if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: not valid JSON: {error}; run the stage that wrote it again") from None


def _mapping(path: Path) -> dict[str, Any]:
    value = _json(path)
    if value is not None and not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value or {}


def _classes(path: Path) -> list[str] | None:
    names = _json(path)
    if names is not None and not isinstance(names, list):
        raise RunError(f"{path}: expected a JSON list of class names, got {type(names).__name__}")
    return [str(name) for name in names] if names else None


def _rows(path: Path) -> list[Row]:
    """Rows by (data, column, model); a row written again replaces the one before."""
    known = [field.name for field in fields(Row)]
    rows: dict[tuple[str, str, Column], Row] = {}
    for number, line in enumerate((_text(path) or "").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            row = Row(**{key: raw[key] for key in known if key in raw})
            _ = float(row.value), float(row.low), float(row.high), int(row.n)
        except (TypeError, ValueError) as error:
            raise RunError(f"{path}, line {number}: not a row of results ({error}); run the probe again") from None
        rows[row.model, row.data, row.column] = row
    place = {"target": 0, "source": 1}
    return sorted(
        rows.values(),
        key=lambda r: (place.get(r.data, 2), r.data, _column_place(r.column), _place(MODELS, r.model)),
    )


def _metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Logged steps in order, the last row of a step winning, and the number of unreadable lines.

    A run that was killed may leave a torn line, and its successor logs some steps once more.
    """
    rows: dict[int, dict[str, Any]] = {}
    torn = 0
    for line in (_text(path) or "").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            torn += 1
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "event" not in row:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)], torn


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: cannot read these arrays: {error}; run the probe again") from None
