"""What `explora compare` left on disk, read into plain values: a point for each entry and step, means over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

from explora.errors import RunError
from explora.reporting.rows import Column, Row

Family = Literal["labels", "both", "before"]
"""Learnt from labels alone; without labels first, then from labels; the same before its labels, or without any."""
FAMILIES: tuple[Family, ...] = ("labels", "both", "before")
RESULTS, STATE = "results.jsonl", "comparison.json"
UNADAPTED = "baseline"
"""What rows call the backbone that every entry begins with."""
HEAD = "head"
"""The evaluator that is a fine-tuned model's own classifier, which the unadapted backbone has none of."""
ROLES = {"target": "test", "segmentation": "masks_test", "source": "source_test", "control": "control"}
"""The shards that judge, by what rows call the data, in reading order."""
_MANIFESTS = "shards/*/manifest.json"


class Change(NamedTuple):
    """A paired difference to the unadapted backbone in points: the mean over seeds, and each seed's.

    `low` and `high` are the means of the seeds' 95 % limits over images. An interval that draws images anew for the
    mean over seeds is no wider: the standard error of a mean is at most the mean of the standard errors.
    """

    value: float
    low: float
    high: float
    seeds: Mapping[int, float]

    @classmethod
    def of(cls, rows: Mapping[int, Row]) -> Change | None:
        """From the rows by seed; None where none was compared."""
        found = {
            seed: (row.difference, row.difference_low, row.difference_high)
            for seed, row in rows.items()
            if row.difference is not None and row.difference_low is not None and row.difference_high is not None
        }
        if not found or not np.isfinite(list(found.values())).all():
            return None
        value, low, high = np.mean(list(found.values()), axis=0).tolist()
        return cls(value, low, high, {seed: float(numbers[0]) for seed, numbers in found.items()})

    @property
    def over_seeds(self) -> tuple[float, float] | None:
        """95 % t interval over k training seeds, k - 1 degrees of freedom (Student 1908); None below two."""
        values = np.array(list(self.seeds.values()))
        if len(values) < 2:
            return None
        half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values)))
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Point:
    """One model that an entry gives, over its finished seeds; `trained` and `seconds` count both of two stages."""

    entry: str
    family: Family
    learnt: str
    objective: str
    """What it learnt without labels; empty where it did not."""
    trained: int
    seconds: float
    seeds: list[int]
    changes: Mapping[tuple[str, Column], Change]
    head: float | None


@dataclass(frozen=True)
class Comparison:
    """All points in the order of the config; `baseline` in percent, `images` that judged, by data and column."""

    path: Path
    points: list[Point]
    baseline: Mapping[tuple[str, Column], float]
    images: Mapping[tuple[str, Column], int]
    entries: list[str]
    seeds: list[int]
    failures: Mapping[str, str]
    leaks: list[str]
    config: str | None
    """None without comparison.json: what was planned is not known then."""
    environment: Mapping[str, Any]
    """Command, versions, commit and machine of the last process that worked here."""
    shards: Mapping[str, Mapping[str, Any]]
    """What the manifests say, by role."""

    def columns(self, data: str) -> list[Column]:
        """What was compared on `data`, in the order of the config: the first was declared to be the headline."""
        known = [column for where, column in self.baseline if where == data]
        return [column for column in known if any((data, column) in point.changes for point in self.points)]

    def name(self, data: str) -> str:
        """What data call themselves; `the target data` where that says nothing."""
        name = str(self.shards.get(ROLES[data], {}).get("name", data))
        return f"the {data} data" if name in (data, *ROLES.values()) else name

    @property
    def planned(self) -> int:
        return len(self.entries) * len(self.seeds)

    @property
    def done(self) -> int:
        """Runs with a result."""
        return len({(point.entry, seed) for point in self.points for seed in point.seeds})

    @property
    def progress(self) -> str:
        """How many runs there are, of how many."""
        if self.config is None:
            return f"{self.done} runs found, of a number not recorded"
        return f"{self.done} of {self.planned} runs done"


def is_comparison(folder: Path) -> bool:
    """Whether a folder is one that `explora compare` wrote: results beside shards, which a probe keeps elsewhere."""
    return (folder / STATE).is_file() or ((folder / RESULTS).is_file() and (folder / "shards").is_dir())


def read_comparison(folder: Path) -> Comparison:
    """Read results.jsonl and, where it is there, comparison.json.

    Raises:
        RunError: the folder holds no comparison, or a damaged one.
    """
    if not is_comparison(folder):
        raise RunError(f"{folder}: holds no {RESULTS} of a comparison; give the folder that `explora compare` wrote")
    try:
        state: dict[str, Any] = json.loads(_text(folder / STATE) or "{}")
        lines = [_Line.of(json.loads(line)) for line in _text(folder / RESULTS).splitlines()]
        manifests = {path.parent.name: json.loads(_text(path)) for path in sorted(folder.glob(_MANIFESTS))}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        advice = "run `explora compare` again, which writes them anew"
        raise RunError(f"{folder}: {RESULTS}, {STATE} or a manifest is damaged ({error!r}); {advice}") from None
    entries = list(dict.fromkeys([*state.get("entries", []), *(line.entry for line in lines)]))
    unadapted: dict[tuple[str, Column], list[Row]] = {}
    for line in lines:
        if line.row.model == UNADAPTED:
            unadapted.setdefault((line.row.data, line.row.column), []).append(line.row)
    return Comparison(
        path=folder,
        points=[point for entry in entries for point in _points([one for one in lines if one.entry == entry])],
        baseline={key: float(np.mean([row.value for row in rows])) for key, rows in unadapted.items()},
        images={key: rows[0].n for key, rows in unadapted.items()},
        entries=entries,
        seeds=sorted({*state.get("seeds", []), *(line.seed for line in lines)}),
        failures=state.get("failures", {}),
        leaks=state.get("leaks", []),
        config=state.get("config"),
        environment=state.get("environment", {}),
        shards=state.get("shards", manifests),
    )


class _Line(NamedTuple):
    """One line of results.jsonl."""

    entry: str
    seed: int
    row: Row
    method: str
    objective: str
    trained: float
    seconds: float

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> _Line:
        cost = float(raw["trained_parameters"] or 0), float(raw["seconds"] or 0)
        objective = "labels" if raw["model"] == "finetuned" else str(raw.get("objective") or "no labels")
        return cls(str(raw["entry"]), int(raw["seed"]), Row.of(raw), str(raw["method"]), objective, *cost)


def _points(lines: Sequence[_Line]) -> Iterator[Point]:
    """The points of one entry: its last model first."""
    by_model: dict[str, list[_Line]] = {}
    for line in lines:
        if line.row.model != UNADAPTED:
            by_model.setdefault(line.row.model, []).append(line)
    for model, own in reversed(by_model.items()):
        first, *_ = own
        before = by_model.get("adapted", [])[:1] if model == "finetuned" else []
        steps = [*before, first]
        family: Family = "before" if model == "adapted" else "both" if before else "labels"
        by_column: dict[tuple[str, Column], dict[int, Row]] = {}
        for line in own:
            by_column.setdefault((line.row.data, line.row.column), {})[line.seed] = line.row
        changes = {key: change for key, rows in by_column.items() if (change := Change.of(rows))}
        heads = [line.row.value for line in own if line.row.evaluator == HEAD]
        yield Point(
            entry=first.entry,
            family=family,
            learnt=", then ".join(f"{step.objective} ({step.method})" for step in steps),
            objective="" if family == "labels" else steps[0].objective,
            trained=round(sum(_mean(by_model[step.row.model], "trained") for step in steps)),
            seconds=sum(_mean(by_model[step.row.model], "seconds") for step in steps),
            seeds=sorted({line.seed for line in own}),
            changes=changes,
            head=float(np.mean(heads)) if heads else None,
        )


def _mean(lines: Sequence[_Line], cost: str) -> float:
    """What a stage cost, the mean over its seeds."""
    return float(np.mean(list({line.seed: getattr(line, cost) for line in lines}.values())))


def _text(path: Path) -> str:
    """The content of a file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot read this file: {error}") from None
