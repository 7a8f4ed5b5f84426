"""A module for each task: how it is trained on a frozen backbone, and what the backbone with it says of images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from explora.adapt import adapt
from explora.data import ShardSet
from explora.distributed import gathered, on_first
from explora.errors import WeightsError
from explora.incremental.norms import Pass, plain_names, put_on
from explora.incremental.tasks import Task
from explora.models import Loaded, ViT, read_tensors
from explora.models.additions import added
from explora.models.export import facts_of, save_adapter, save_tensors
from explora.objectives import Objective, Supervised
from explora.stages import finetune
from explora.stages.continual_config import ContinualConfig, joint_folder, task_folder
from explora.stages.fitting import expects
from explora.stages.section import rehearse
from explora.stages.training import learning, opened, seeded, train

MODULE, ADAPTER, HEAD = "module.safetensors", "adapter.safetensors", "head.safetensors"
Values = dict[str, Tensor]


class Learnt:
    """What a module's training leaves: module.safetensors, exactly as it learnt, and the head it learnt with."""

    def __init__(self, objective: Supervised) -> None:
        self._objective = objective

    def save(self, folder: Path) -> None:
        objective = self._objective
        base = {id(tensor) for tensor in objective.frozen().values()}
        state = objective.backbone.state_dict(keep_vars=True)
        values = gathered({name: tensor for name, tensor in state.items() if id(tensor) not in base})
        head = gathered(objective.head.state_dict())
        on_first(lambda: save_tensors(folder / MODULE, values, facts_of(objective.backbone)))
        on_first(lambda: save_tensors(folder / HEAD, head, {"pool": objective.config.pool}))


class TaskModules:
    """The modules that a run has trained so far, in the folders of their tasks.

    Args:
        source: the backbone before any task; it is never changed.
        images: the training images of all classes.
    """

    def __init__(self, config: ContinualConfig, source: ViT, images: ShardSet, tasks: Sequence[Task]) -> None:
        self.config, self.source, self.tasks, self._images = config, source, tasks, images

    def folder(self, task: int) -> Path:
        """The run folder of a task's training."""
        return task_folder(self.config, task) / "module"

    def learn(self, task: int) -> None:
        """Train the module of a task, unless that has been done; every rank must ask.

        Where the method lets nothing of the backbone learn there is nothing to train: the head of this stage is never
        used again.
        """
        seeded(self.config.seed)
        objective = build(self.config, copy.deepcopy(self.source), self._classes)
        if task:
            before = self.folder(task - 1)
            objective.head.load_state_dict(read_tensors(before / HEAD)[0])
            if self.config.goes_on:
                fill(objective.backbone, self.values(task - 1))
        if learning(objective.backbone):
            self._train(self.config, self.folder(task), objective, self.tasks[task].labels, f"task {task}")
        else:
            self._leave(self.folder(task), objective)

    def learn_jointly(self) -> None:
        """Train one module on all tasks at once, with a head of its own; every rank must ask."""
        assert self.config.joint is not None
        seeded(self.config.seed)
        labels = [label for task in self.tasks for label in task.labels]
        config = self.config.model_copy(update={"steps": self.config.joint, "passes": 2})
        objective = finetune.build(config, Loaded(copy.deepcopy(self.source), None, {}), self._classes)
        self._train(config, joint_folder(self.config), objective, labels, "joint")

    def values(self, task: int) -> Values:
        """What the module of a task has learnt, by its names in the adapted backbone."""
        return read_tensors(self.folder(task) / MODULE)[0]

    def plain(self, folder: Path) -> ViT:
        """A copy of the source with the module that a run folder holds, merged."""
        values, vit = read_tensors(folder / MODULE)[0], copy.deepcopy(self.source)
        adapt(vit, self.config.adapt)
        fill(vit, plain_names(values) if self.config.passes == 1 else values)
        self.config.adapt.settle(vit).merge(vit)
        return vit.requires_grad_(False).eval()

    def stored(self, task: int) -> int:
        """How many numbers are kept of a task's module once training is over."""
        kept = read_tensors(self.folder(task) / (MODULE if self.config.passes == 1 else ADAPTER))[0]
        return sum(value.numel() for value in kept.values() if value.is_floating_point())

    def choosing(self, upto: int) -> tuple[ViT, Pass]:
        """A copy of the source whose norms choose among tasks 0 to `upto`, and what knows what they chose."""
        vit, past = copy.deepcopy(self.source), [self.values(task) for task in range(upto + 1)]
        passing = put_on(vit, past[:-1], self.config.seed)
        fill(vit, past[-1])
        passing.chooses = True
        return vit.requires_grad_(False).eval(), passing

    @property
    def _classes(self) -> int:
        return len(self._images.classes or ())

    def _train(
        self, config: ContinualConfig, folder: Path, objective: Supervised, labels: Sequence[int], stage: str
    ) -> None:
        objective.decide_between(labels)
        own = config.model_copy(update={"out": str(folder)})
        images = self._images.taking(np.flatnonzero(np.isin(self._images.labels, labels)))
        with opened(own) as run:
            if on_first(lambda: run.summary) is None:
                summary = train(run, own, own.seed, objective, Learnt(objective), images, stage)
                on_first(lambda: self._settled(own))
                run.finish(summary)

    def _leave(self, folder: Path, objective: Supervised) -> None:
        """Leave the files of a training that has nothing to train."""
        own = self.config.model_copy(update={"out": str(folder)})
        with opened(own) as run:
            if on_first(lambda: run.summary) is None:
                Learnt(objective).save(run.folder)
                on_first(lambda: self._settled(own))
                run.finish({"method": self.config.adapt.name, "trained_parameters": 0, "seconds": 0.0})

    def _settled(self, config: ContinualConfig) -> None:
        """Write adapter.safetensors, for `explora.adapt.attach`, beside the module that a run folder holds."""
        if config.passes == 1:
            return  # keys have no place in an adapter
        vit = copy.deepcopy(self.source)
        expects(vit, config.views)
        learns = adapt(vit, config.adapt)
        fill(vit, read_tensors(Path(config.out) / MODULE)[0])
        method = config.adapt.settle(vit)
        kept = added(vit, lasting=False) | set(learns)
        names = [name for name in vit.state_dict() if name in kept]
        save_adapter(Path(config.out) / ADAPTER, vit, names, method.model_dump(mode="json"))


def build(config: ContinualConfig, vit: ViT, classes: int) -> Supervised:
    """Adapt a backbone, in place, for the module of a task, and put a fresh head on it.

    In one pass the loss is cross-entropy less the similarity to the keys of the task (De Min et al. 2023).
    """
    if config.passes == 2:
        return finetune.build(config, Loaded(vit, None, {}), classes)
    passing = put_on(vit, [], config.seed)
    expects(vit, config.views)
    adapt(vit, config.adapt)
    objective = Supervised(config.objective, vit, classes, extra=passing.terms)
    objective.method = config.adapt
    return objective


@torch.no_grad()
def fill(vit: ViT, values: Mapping[str, Tensor]) -> None:
    """Put what was learnt into a backbone that is adapted alike.

    Raises:
        WeightsError: a name or shape that the backbone does not have.
    """
    state = vit.state_dict()
    strange = [name for name, value in values.items() if name not in state or state[name].shape != value.shape]
    if strange:
        raise WeightsError(f"what a task learnt does not fit the model and method: {', '.join(strange[:5])}")
    for name, value in values.items():
        state[name].copy_(value)


def rehearse_module(config: ContinualConfig, source: Loaded, classes: int) -> Objective:
    """Meet the mistakes of training a module before there is any work to lose.

    Args:
        source: the backbone, which stays as it is, or a `blueprint` of it.

    Returns:
        A module of the first task on tensors without memory.

    Raises:
        ConfigError: the method, the passes, the batch or the optimizer's rules do not fit the backbone.
    """
    sketch = Loaded(copy.deepcopy(source.vit).to("meta"), None, {})
    objective = rehearse(config, copy.deepcopy(sketch), partial(finetune.build, classes=classes))
    if config.passes == 2:
        return objective
    with torch.device("meta"):
        return build(config, sketch.vit, classes)
