"""What a class-incremental run left on disk, read into plain values: accuracy by task and time, joint training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from explora.errors import RunError

ORACLE, ONE_PASS = "oracle", "one_pass"
"""The variants that are told which task an image is of, and whose norms choose it by themselves; others are routers."""
CORRECTED, RETAINED = " + arc", " + retention"
"""What the names of variants end in whose predictions are corrected, the second by a head that goes on learning."""


@dataclass(frozen=True)
class Variant:
    """One way to choose the task of an image, and what came of it, in percent.

    `accuracy[t][i]` is that on the test images of task i after task t, `selection[t][i]` how many of these images were
    given to the right task; the other numbers are those after the newest task.
    """

    name: str
    accuracy: list[list[float]]
    selection: list[list[float]] | None
    average: float
    low: float
    high: float
    forgetting: float
    average_incremental: float

    @classmethod
    def of(cls, name: str, raw: Mapping[str, Any]) -> Variant:
        """Read one entry of `variants`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        selection = None if raw["selection"] is None else _triangle(raw["selection"])
        numbers = {key: _number(raw[key]) for key in ("average", "low", "high", "forgetting", "average_incremental")}
        return cls(name, _triangle(raw["accuracy"]), selection, **numbers)

    @property
    def choice(self) -> str:
        """Its way to choose the task, without the corrections that follow."""
        return self.name.removesuffix(CORRECTED).removesuffix(RETAINED)

    @property
    def told(self) -> bool:
        """Whether the true task of every image was told."""
        return self.choice == ORACLE

    @property
    def averages(self) -> list[float]:
        """The mean over the tasks so far, after each task."""
        return [float(np.mean(row)) for row in self.accuracy]

    @property
    def selected(self) -> float | None:
        """How often the right task was chosen after the newest task, the mean over tasks; None where none is chosen."""
        return float(np.mean(self.selection[-1])) if self.selection else None


@dataclass(frozen=True)
class Joint:
    """What to compare with: the same method, trained on all classes at once; percent."""

    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Continual:
    """What results.json says, and the recorded configs by the folder that each is of."""

    path: Path
    model: str
    method: str
    passes: int
    tasks: list[list[str]]
    train_images: list[int]
    test_images: list[int]
    module_parameters: int
    seconds: float
    variants: list[Variant]
    joint: Joint | None
    configs: list[tuple[str, str]]

    @property
    def done(self) -> int:
        """How many tasks were learnt and judged."""
        return len(self.variants[0].accuracy) if self.variants else 0

    @property
    def finished(self) -> bool:
        return self.done == len(self.tasks)

    @property
    def oracle(self) -> Variant | None:
        return next((variant for variant in self.variants if variant.name == ORACLE), None)

    @property
    def main(self) -> Variant | None:
        """What the headline is about: the first way to choose the task, never the one with the best number."""
        return next((variant for variant in self.variants if not variant.told), self.oracle)


def read_continual(folder: Path) -> Continual:
    """Read what `explora continual` left in a folder.

    Raises:
        RunError: there is no results.json, or it is not what that command writes.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise RunError(f"{path}: no such file; give the folder of an `explora continual` run that has learnt a task")
    try:
        return _of(folder, json.loads(_text(path)))
    except KeyError as error:
        reason = f"{error} is missing"
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error)
    raise RunError(
        f"{path}: not the results of a continual run ({reason}); remove it and run `explora continual` again, or "
        "give another folder"
    )


def _of(folder: Path, raw: Mapping[str, Any]) -> Continual:
    tasks = [[str(name) for name in names] for names in raw["tasks"]]
    train, test = ([int(number) for number in raw[f"{role}_images"]] for role in ("train", "test"))
    variants = [Variant.of(str(name), found) for name, found in raw["variants"].items()]
    tables = [rows for each in variants for rows in (each.accuracy, each.selection) if rows is not None]
    done = max(map(len, tables), default=0)
    if {len(train), len(test)} != {len(tasks)} or done > len(tasks) or any(len(rows) != done for rows in tables):
        raise ValueError("its lists do not cover the same tasks")
    joint = raw["joint"] and Joint(*(_number(raw["joint"][key]) for key in ("accuracy", "low", "high")))
    configs = [("the whole run", folder / "config.yaml")]
    configs += [(str(place.relative_to(folder)), place / "config.yaml") for place in _stages(folder)]
    recorded = [(label, _text(place)) for label, place in configs if place.is_file()]
    return Continual(
        path=folder,
        model=str(raw["model"]),
        method=str(raw["method"]),
        passes=int(raw["passes"]),
        tasks=tasks,
        train_images=train,
        test_images=test,
        module_parameters=int(raw["module_parameters"]),
        seconds=float(raw["seconds"]),
        variants=variants,
        joint=joint,
        configs=recorded,
    )


def _stages(folder: Path) -> list[Path]:
    """The folders of the modules' training, task by task, and of the joint one."""
    return [*sorted(folder.glob("task*/module")), *folder.glob("joint")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot read this file: {error}") from None


def _number(value: Any) -> float:
    """A number, where null stands for one that does not exist yet."""
    return math.nan if value is None else float(value)


def _triangle(rows: Any) -> list[list[float]]:
    """Row t with the numbers of the tasks 0 to t."""
    found = [[float(value) for value in row] for row in rows]
    if [len(row) for row in found] != list(range(1, len(found) + 1)):
        raise ValueError("row t of an accuracy table holds a number for each of the tasks 0 to t")
    return found
