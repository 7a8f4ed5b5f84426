"""How the classes of a set are cut into tasks that come one after another."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from explora.config import Config
from explora.errors import ConfigError


class Task(NamedTuple):
    """The classes of one task; `labels` are their numbers among all classes of the shards."""

    classes: tuple[str, ...]
    labels: tuple[int, ...]


class TasksConfig(Config):
    """The tasks of a run: so many classes each, or lists of class names."""

    size: int | None = Field(None, ge=1)
    """Classes of each task, in the order of the set; the last task takes what is left."""
    classes: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] | None = None
    """The class names of each task; what no list names stays out of the run."""
    shuffle: bool = False
    """Whether the seed of the run shuffles the classes before `size` cuts them."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TasksConfig:
        if (self.size is None) == (self.classes is None):
            raise ValueError("give either size (classes of each task) or classes (a list of names for each task)")
        if self.shuffle and self.classes is not None:
            raise ValueError("shuffle goes with size; the lists of `classes` say the order already")
        return self

    def split(self, classes: Sequence[str], seed: int) -> list[Task]:
        """Cut the classes of a set, given in the order of its labels, into tasks.

        Args:
            seed: of the run; the order of classes follows from it where `shuffle` is on.

        Raises:
            ConfigError: fewer than two tasks, a lone class left for the last one, a name that the set lacks, or one
                that comes twice.
        """
        lists = self._cut(classes, seed) if self.classes is None else self.classes
        label = {name: number for number, name in enumerate(classes)}
        named = [name for names in lists for name in names]
        for name in named:
            if name not in label:
                raise ConfigError(f"tasks.classes: the set has no class '{name}'" + _nearest(name, classes))
            if named.count(name) > 1:
                raise ConfigError(f"tasks.classes: '{name}' comes twice; a class belongs to one task only")
        if len(lists) < 2:
            raise ConfigError(
                f"tasks: {len(named)} classes in one task, so nothing comes after anything; cut them into two or more"
            )
        return [Task(tuple(names), tuple(label[name] for name in names)) for names in lists]

    def _cut(self, classes: Sequence[str], seed: int) -> list[tuple[str, ...]]:
        assert self.size is not None
        order = np.random.default_rng(seed).permutation(len(classes)) if self.shuffle else range(len(classes))
        names = [classes[number] for number in order]
        lists = [tuple(names[first : first + self.size]) for first in range(0, len(names), self.size)]
        if self.size > 1 and len(lists) > 1 and len(lists[-1]) == 1:
            raise ConfigError(
                f"tasks.size: {len(names)} classes in tasks of {self.size} leave a lone class for the last task, which "
                "cannot be told from anything; take another size, or list the classes of each task in tasks.classes"
            )
        return lists


def task_of_label(tasks: Sequence[Task], classes: int) -> Tensor:
    """The task (C,) int64 of each of `classes` labels, -1 for those in no task."""
    owner = torch.full((classes,), -1)
    for number, task in enumerate(tasks):
        owner[list(task.labels)] = number
    return owner


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(repr(one) for one in near)}?" if near else f"; it has {', '.join(known[:10])}"
