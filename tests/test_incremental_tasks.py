"""How classes are cut into tasks, and which cuts are refused."""

from __future__ import annotations

import pytest
import torch

from explora.config import validate
from explora.errors import ConfigError
from explora.incremental import Task, TasksConfig, task_of_label

CLASSES = ["airport", "beach", "chaparral", "forest", "harbor", "river", "runway"]


def test_size_cuts_in_the_order_of_the_set_and_the_last_task_takes_the_rest():
    assert TasksConfig(size=5).split(CLASSES, seed=3) == [
        Task(("airport", "beach", "chaparral", "forest", "harbor"), (0, 1, 2, 3, 4)),
        Task(("river", "runway"), (5, 6)),
    ]
    assert [task.labels for task in TasksConfig(size=1).split(CLASSES, 0)] == [(label,) for label in range(7)]


def test_shuffling_follows_the_seed_and_loses_no_class():
    config = TasksConfig(size=4, shuffle=True)
    first, again, other = config.split(CLASSES, 0), config.split(CLASSES, 0), config.split(CLASSES, 1)
    assert first == again != other
    assert first != TasksConfig(size=4).split(CLASSES, 0)
    assert [len(task.labels) for task in first] == [4, 3]
    assert sorted(label for task in first for label in task.labels) == list(range(7))
    assert all(CLASSES[label] == name for task in first for name, label in zip(*task, strict=True))


def test_lists_name_the_classes_and_leave_out_others():
    tasks = TasksConfig(classes=(("river", "airport"), ("forest",))).split(CLASSES, 0)
    assert tasks == [Task(("river", "airport"), (5, 0)), Task(("forest",), (3,))]
    assert torch.equal(task_of_label(tasks, 7), torch.tensor([0, -1, -1, 1, -1, 0, -1]))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"classes": [["river"], ["harbour"]]}, "no class 'harbour'; did you mean 'harbor'"),
        ({"classes": [["river"], ["zzz"]]}, "it has airport, beach"),
        ({"classes": [["river"], ["beach", "river"]]}, "'river' comes twice"),
        ({"classes": [["river", "beach"]]}, "2 classes in one task"),
        ({"size": 7}, "7 classes in one task"),
        ({"size": 9}, "7 classes in one task"),
        ({"size": 3}, "lone class"),
        ({"size": 6}, "lone class"),
    ],
)
def test_cuts_that_do_not_fit_the_set_are_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        validate(TasksConfig, raw).split(CLASSES, 0)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "either size"),
        ({"size": 2, "classes": [["a"], ["b"]]}, "either size"),
        ({"shuffle": True, "classes": [["a"], ["b"]]}, "shuffle goes with size"),
        ({"size": 0}, "greater than or equal to 1"),
        ({"classes": [["a"], []]}, "at least 1 of them"),
    ],
)
def test_contradictory_settings_are_refused(raw, said):
    with pytest.raises(ConfigError, match=said):
        validate(TasksConfig, raw)
