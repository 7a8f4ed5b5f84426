"""`explora continual`: tasks of classes one after another, a module for each, and what is left of the earlier ones."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from explora import config as configs
from explora.config import Overrides
from explora.data import ShardSet
from explora.distributed import on_first
from explora.errors import DataError, RunError
from explora.incremental.scores import Progression, accuracy, interval
from explora.incremental.tasks import Task, task_of_label
from explora.models import ViT, fingerprint, load_model, read_tensors
from explora.models.export import save_tensors
from explora.reporting.continual_run import CORRECTED, ONE_PASS, ORACLE, RETAINED
from explora.runs import write_atomically
from explora.stages.continual_config import ContinualConfig, joint_folder, task_folder
from explora.stages.fitting import expects
from explora.stages.pipeline import report
from explora.stages.section import fitted
from explora.stages.sources import local_set, refuse_strange_sets
from explora.stages.task_features import TaskFeatures
from explora.stages.task_modules import HEAD, TaskModules, rehearse_module
from explora.stages.training import announce, opened, seeded, together

logger = logging.getLogger("explora")
ORIGIN, STATE = "origin.json", "state.safetensors"


@dataclass(frozen=True)
class Learned:
    """What `explora continual` leaves."""

    folder: Path
    results: dict[str, Any]
    """Content of results.json."""


def continual(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> Learned:
    """Learn tasks of classes one after another, each with a module of its own on a frozen backbone, and judge them all.

    After each task, all test images so far are judged among all classes so far. Parameters of earlier tasks never
    change, so what is forgotten is lost by the choice of module and by classes that compete in the head. Follows
    De Min et al. 2023 (arXiv 2308.09610), but what is remembered of a task and the head learn from center crops, whose
    features are computed once and kept in `features/`; the paper augments there as well. Beside training, most time
    goes into these: each task's images are seen once by the source and once by every module they are ever sent to.
    `joint` trains with the same `optim`, where the paper takes Adam at .001 x batch / 256. Goes on where an unfinished
    run stopped.

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folder.
    """
    config = configs.load(ContinualConfig, source, overrides)
    with together(config.loop):
        return _continual(config)


def _continual(config: ContinualConfig) -> Learned:
    seeded(config.seed)
    sets = {"train": local_set(config.train, config.scratch), "test": local_set(config.test, config.scratch)}
    tasks = tasks_of(config, sets)
    loaded = load_model(config.model)
    config = fitted(config, loaded.vit, sets["train"].pixels)
    for shards in sets.values():
        refuse_strange_sets(shards, config.views)
    rehearse_module(config, loaded, len(sets["train"].classes or ()))
    expects(loaded.vit, config.views)
    with opened(config) as run:
        results = Path(config.out) / "results.json"
        if on_first(lambda: run.summary) is None:
            announce(loaded.vit, loaded.account)
            modules = TaskModules(config, loaded.vit, sets["train"], tasks)
            course = _Course(modules, sets, loaded.vit)
            on_first(course.claim)
            for task in range(len(tasks)):
                if not on_first(partial(course.resumes, task)):
                    modules.learn(task)
                    on_first(partial(course.judge, task))
            if config.joint is not None:
                modules.learn_jointly()
            summary = on_first(course.finish)
            on_first(lambda: str(report(config.out)))
            run.finish(summary)
        else:
            logger.info("%s: already finished", config.out)
        return Learned(run.folder, on_first(lambda: json.loads(results.read_text())))


def tasks_of(config: ContinualConfig, sets: Mapping[str, ShardSet]) -> list[Task]:
    """The tasks that a config makes of the classes of shards called `train` and `test`.

    Raises:
        DataError: shards without labels, other classes in one than in the other, or a class without images.
        ConfigError: see `TasksConfig.split`.
    """
    classes = sets["train"].classes
    for name, shards in sets.items():
        if shards.classes is None:
            raise DataError(f"{name}: {shards.folder} has no labels; pack it with one folder per class")
        if shards.classes != classes:
            raise DataError(
                f"test: {shards.folder} has other classes than {sets['train'].folder}; pack both with the same folders"
            )
    assert classes is not None
    tasks = config.tasks.split(classes, config.seed)
    for name, shards in sets.items():
        there = set(shards.labels.tolist())
        empty = [classes[label] for task in tasks for label in task.labels if label not in there]
        if empty:
            raise DataError(f"{name}: {shards.folder} has no image of {', '.join(empty[:5])}; add some to each class")
    return tasks


class _Variant(NamedTuple):
    """One way to come from a test image to a label, on the images of each task so far."""

    label: str
    features: list[Tensor]
    routes: list[Tensor] | None
    """The task (N,) or the tasks (N, norms) that each image was sent to; None where that was told."""


class _Course:
    """What is remembered from task to task, beside the modules: by routers, by the head, and the results."""

    def __init__(self, modules: TaskModules, sets: Mapping[str, ShardSet], source: ViT) -> None:
        self.modules, self.config, self.tasks = modules, modules.config, modules.tasks
        self.sets, self.features = sets, TaskFeatures(modules, sets)
        self.classes = len(sets["train"].classes or ())
        self.task_of_class = task_of_label(self.tasks, self.classes)
        self.origin = {"weights": fingerprint(source.state_dict())}
        self.origin |= {name: shards.fingerprint for name, shards in sets.items()}
        self.name = source.name
        self.remembered: list[list[Tensor]] = [[] for _ in self.config.routers]
        self.head: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.seconds = 0.0

    def claim(self) -> None:
        """Record what the run is made from, or compare that with what it began with.

        Raises:
            RunError: it began with other images or weights.
        """
        path = Path(self.config.out) / ORIGIN
        if not path.exists():
            write_atomically(path, json.dumps(self.origin, indent=1) + "\n")
        began = json.loads(path.read_text())
        if began != self.origin:
            other = ", ".join(name for name, value in self.origin.items() if began.get(name) != value)
            raise RunError(
                f"{path}: the run began with other images or weights ({other}); restore them or choose another out"
            )

    def resumes(self, task: int) -> bool:
        """Take over what an earlier session left of a task, if it finished that."""
        path = task_folder(self.config, task) / STATE
        if not path.exists():
            return False
        tensors, facts = read_tensors(path)
        for number, remembered in enumerate(self.remembered):
            if self.config.passes == 2:
                remembered.append(tensors[f"router.{number}"])
        self.head = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
        self.rows.append(facts["variants"])
        self.seconds += facts["seconds"]
        return True

    def judge(self, task: int) -> None:
        """After the training of a task's module: let routers and head learn from it, judge, and leave all on disk."""
        began = time.monotonic()
        if self.config.passes == 2:
            seen = self.features.source("train", task)
            for router, remembered in zip(self.config.routers, self.remembered, strict=True):
                remembered.append(router.fit(seen, task, self.config.seed))
        features = self._routed("train", task, task)[0]
        state = self.head or self.config.head.begin(features.shape[1], self.classes, self.config.seed)
        labels = self.features.labels("train", task)
        self.head = self.config.head.fit(state, features, labels, self.tasks[task].labels, self.config.seed)
        self.rows.append(dict(row for variant in self._variants(task) for row in self._scored(variant, task)))
        trained = json.loads((self.modules.folder(task) / "summary.json").read_text())["seconds"]
        seconds = time.monotonic() - began + trained
        self.seconds += seconds
        tensors = {f"head.{name}": value for name, value in self.head.items()}
        tensors |= {f"router.{number}": known[-1] for number, known in enumerate(self.remembered) if known}
        facts = {"variants": self.rows[-1], "seconds": seconds}
        save_tensors(task_folder(self.config, task) / STATE, tensors, facts)
        self._write(None)
        averages = [Progression([self.rows[-1][label]["accuracy"]]).average for label in (ORACLE, self._first)]
        logger.info("task %d: %.1f %% with the true task's module, %.1f %% by %s", task, *averages, self._first)

    def finish(self) -> dict[str, Any]:
        """Judge the joint training, write results.json for the last time; returns the summary."""
        results = self._write(None if self.config.joint is None else self._joint())
        variant = results["variants"][self._first]
        return {
            "stage": "continual",
            "model": self.name,
            "method": self.config.adapt.name,
            "tasks": len(self.tasks),
            "module_parameters": results["module_parameters"],
            "seconds": round(self.seconds, 2),
            **{key: variant[key] for key in ("average", "low", "high", "forgetting")},
        }

    @property
    def _first(self) -> str:
        """The variant that the head learnt with."""
        return ONE_PASS if self.config.passes == 1 else self.config.routers[0].label

    def _routed(self, name: str, task: int, upto: int, router: int = 0) -> tuple[Tensor, Tensor]:
        """Features of a task's images, with the tasks among 0 to `upto` that they are sent to."""
        if self.config.passes == 1:
            return self.features.chosen(name, task, upto)
        known = self.remembered[router][: upto + 1]
        route = self.config.routers[router].route(self.features.source(name, task), known)
        return self.features.routed(name, task, route), route

    def _variants(self, task: int) -> Iterator[_Variant]:
        upto = range(task + 1)
        told = [self.features.under("test", number, self.modules.folder(number)) for number in upto]
        yield _Variant(ORACLE, told, None)
        labels = [ONE_PASS] if self.config.passes == 1 else [router.label for router in self.config.routers]
        for number, label in enumerate(labels):
            features, routes = zip(*(self._routed("test", each, task, number) for each in upto), strict=True)
            yield _Variant(label, list(features), list(routes))

    def _scored(self, variant: _Variant, task: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The accuracies of a variant after a task, without correction and with it."""
        found = {variant.label: self._decide(variant.features, task)}
        if (arc := self.config.arc) is not None:
            logits = (self.config.head.logits(self.head, part) for part in variant.features)
            found[variant.label + CORRECTED] = [arc.correct(part, self.task_of_class, task) for part in logits]
            if arc.beta is not None:
                state, owner, seed = self.head, self.task_of_class, self.config.seed
                found[variant.label + RETAINED] = arc.correct_retained(state, variant.features, owner, task, seed)
        truth = [self.features.labels("test", number) for number in range(task + 1)]
        chosen = variant.routes
        selection = None if chosen is None else [100 * float((r == i).double().mean()) for i, r in enumerate(chosen)]
        for label, predictions in found.items():
            low, high = interval([p == y for p, y in zip(predictions, truth, strict=True)], seed=self.config.seed)
            scores = [accuracy(p, y) for p, y in zip(predictions, truth, strict=True)]
            yield label, {"accuracy": scores, "selection": selection, "low": low, "high": high}

    def _decide(self, features: Sequence[Tensor], task: int) -> list[Tensor]:
        """Labels among the classes of all tasks so far."""
        return [decided(self.config.head.logits(self.head, part), self.task_of_class, task) for part in features]

    def _joint(self) -> dict[str, Any]:
        """Joint training, judged by the head that it was trained with."""
        folder = joint_folder(self.config)
        head = read_tensors(folder / HEAD)[0]
        predictions, truth = [], []
        for task in range(len(self.tasks)):
            logits = torch.nn.functional.linear(self.features.under("test", task, folder), head["weight"], head["bias"])
            predictions.append(decided(logits, self.task_of_class, len(self.tasks) - 1))
            truth.append(self.features.labels("test", task))
        by_task = [accuracy(p, y) for p, y in zip(predictions, truth, strict=True)]
        low, high = interval([p == y for p, y in zip(predictions, truth, strict=True)], seed=self.config.seed)
        return {"accuracy": Progression([by_task]).average, "low": low, "high": high, "by_task": by_task}

    def _write(self, joint: dict[str, Any] | None) -> dict[str, Any]:
        tasks = range(len(self.tasks))
        counts = {name: [len(self.features.labels(name, task)) for task in tasks] for name in self.sets}
        results = {
            "model": self.name,
            "method": self.config.adapt.name,
            "passes": self.config.passes,
            "tasks": [list(task.classes) for task in self.tasks],
            "train_images": counts["train"],
            "test_images": counts["test"],
            "module_parameters": max(map(self.modules.stored, range(len(self.rows)))),
            "seconds": round(self.seconds, 2),
            "variants": {label: _progress([row[label] for row in self.rows]) for label in self.rows[0]},
            "joint": joint,
        }
        write_atomically(Path(self.config.out) / "results.json", json.dumps(results, indent=1) + "\n")
        return results


def decided(logits_NC: Tensor, task_of_class_C: Tensor, task: int) -> Tensor:
    """The label (N,) with the largest logit among the classes of tasks 0 to `task`; -1 marks a class of none."""
    out = (task_of_class_C < 0) | (task_of_class_C > task)
    return logits_NC.masked_fill(out, -torch.inf).argmax(1)


def _progress(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A variant's rows after each task, and what they come to."""
    steps = Progression([row["accuracy"] for row in rows])
    selection = [row["selection"] for row in rows]
    return {
        "accuracy": list(steps.accuracy),
        "selection": None if None in selection else selection,
        "average": steps.average,
        "low": rows[-1]["low"],
        "high": rows[-1]["high"],
        "forgetting": steps.forgetting,
        "average_incremental": steps.average_incremental,
    }
