"""Read the folder of a finished chain into plain values; a part that is absent becomes empty or None."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from explora.config import read
from explora.errors import RunError
from explora.reporting.rows import Results, Row, gather

STAGES = ("pretrain", "finetune")
ROLES = ("pretrain", "train", "test", "source_train", "source_test", "control", "masks_train", "masks_test")
_NAMED_BY = {
    "target": ("test", "train"),
    "segmentation": ("masks_test", "masks_train"),
    "source": ("source_test",),
    "control": ("control",),
}


@dataclass(frozen=True)
class Stage:
    """One training stage: its summary, its logged steps and how many lines of them were torn, its pictures.

    `objective` is what the recorded config says of it; empty where there is none.
    """

    name: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    torn: int
    config: str | None
    environment: dict[str, Any]
    pictures: dict[str, np.ndarray]
    has_best: bool
    objective: dict[str, Any]


@dataclass(frozen=True)
class Chain(Results):
    """Everything the report knows; arrays and pictures as the probe left them."""

    path: Path
    stages: list[Stage]
    shards: dict[str, dict[str, Any]]
    classes: list[str] | None
    arrays: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    config: str | None
    environment: dict[str, Any]
    leaks: list[str]
    """What judges although it has taught."""

    def data_name(self, data: str) -> str:
        """What the shards behind one of `DATA` call themselves; `the target data` where that is empty."""
        names = [str(self.shards[role].get("name", role)) for role in _NAMED_BY.get(data, ()) if role in self.shards]
        return next((name for name in names if name not in ROLES), f"the {data} data")


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
    found = gather(_rows(results))
    return Chain(
        rows=found.rows,
        models=found.models,
        path=run,
        stages=sorted(stages, key=lambda stage: _place(STAGES, stage.name)),
        shards={role: _mapping(path) for role in ROLES if (path := run / "shards" / role / "manifest.json").is_file()},
        classes=_classes(run / "probe" / "classes.json"),
        arrays=_arrays(run / "probe" / "predictions.npz"),
        pictures=_arrays(run / "probe" / "pictures.npz"),
        config=_text(run / "config.yaml"),
        environment=_mapping(run / "environment.json"),
        leaks=_mapping(run / "summary.json").get("leaks", []),
    )


def _place(order: tuple[str, ...], name: str) -> tuple[int, str]:
    """Known names in their order, unknown ones after them by alphabet."""
    return (order.index(name) if name in order else len(order), name)


def _stage(folder: Path) -> Stage:
    metrics, torn = _metrics(folder / "metrics.jsonl")
    config, environment = _text(folder / "config.yaml"), _mapping(folder / "environment.json")
    pictures, has_best = _arrays(folder / "pictures.npz"), (folder / "best").is_dir()
    summary = _mapping(folder / "summary.json")
    given = read(folder / "config.yaml").get("objective") if config is not None else None
    objective = given if isinstance(given, dict) else {}
    return Stage(folder.name, summary, metrics, torn, config, environment, pictures, has_best, objective)


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
    rows: list[Row] = []
    for number, line in enumerate((_text(path) or "").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(Row.of(dict(json.loads(line))))
        except (TypeError, ValueError) as error:
            raise RunError(f"{path}, line {number}: not a row of results ({error}); run the probe again") from None
    return rows


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
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)], torn


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{path}: cannot read these arrays: {error}; run the stage that wrote it again") from None
