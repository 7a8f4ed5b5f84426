"""A module for each task: how it is trained on a frozen backbone, and what the backbone with it says of images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from explora.adapt import AnyMethod, Norms, adapt
from explora.data import ShardSet
from explora.distributed import gathered, on_first
from explora.engine import OptimConfig
from explora.errors import WeightsError
from explora.incremental.arc import ARC
from explora.incremental.heads import AnyHead, LinearHead
from explora.incremental.norms import Pass, plain_names, put_on
from explora.incremental.routers import AnyRouter, Keys
from explora.incremental.tasks import Task, TasksConfig
from explora.models import Loaded, ViT, read_tensors
from explora.models.export import facts_of, save_tensors
from explora.objectives import Objective, Supervised, SupervisedConfig
from explora.objectives.base import Batch, StepOutput
from explora.schedules import Length, LengthField, Progress
from explora.stages import finetune
from explora.stages.finetune import FinetuneSection
from explora.stages.fitting import expects
from explora.stages.section import TrainingPlace, rehearse
from explora.stages.training import opened, seeded, train

Values = dict[str, Tensor]


class TaskOptim(OptimConfig):
    """AdamW for one task: De Min et al. 2023 train at a constant rate, without decay, with a fresh optimizer."""

    lr: float = Field(0.005, gt=0)
    """Peak learning rate before `lr_rule`."""
    lr_rule: Literal["none", "sqrt1024", "linear256"] = "linear256"
    """How the rate follows the batch of a step: not, by sqrt(batch / 1024), by batch / 256."""
    min_lr: float = Field(1.0, ge=0)
    """Where the cosine ends; at the peak or above, the rate is constant."""
    warmup: LengthField = Length(0, "steps")
    """Length of the linear warm-up from zero."""
    weight_decay: tuple[float, float] = (0.0, 0.0)
    """Start and end of weight decay; above 0 it also pulls at rows of the head that learn nothing."""


class ContinualConfig(TrainingPlace, FinetuneSection):
    """Config of `explora continual`; a training setting is that of each task."""

    train: str
    """Labelled shards that `explora pack` wrote, to learn from."""
    test: str
    """Labelled shards of the same classes that only judge."""
    tasks: TasksConfig
    """Which classes come together, and in which order."""
    passes: Literal[1, 2] = 2
    """2: a router picks the task of an image, then the task's module sees it; 1: each LayerNorm picks by itself."""
    routers: tuple[AnyRouter, ...] = Field((Keys(),), min_length=1)
    """What finds the task of an image; the first one routes while the head learns, all are compared."""
    head: AnyHead = LinearHead()
    """The classifier over all classes."""
    arc: ARC | None = None
    """Corrects decisions at test time; null leaves it out, otherwise each variant is judged with and without it."""
    warm_start: bool = True
    """Whether the module of a task starts as that of the task before; otherwise as the method starts."""
    joint: LengthField | None = Length(10, "epochs")
    """Length of training on all tasks at once, the upper bound; null leaves it out."""
    steps: LengthField = Length(5, "epochs")
    """Length of the training of each task's module, in its own images."""
    adapt: AnyMethod = Norms()
    """What a module is: which part of the backbone a task may change, and how."""
    objective: SupervisedConfig = SupervisedConfig(pool="cls", label_smoothing=0)
    """The loss of a module's training; `pool` is also what the head is given."""
    optim: TaskOptim = TaskOptim()
    """Learning rates, their schedule and weight decay."""

    @model_validator(mode="after")
    def _told_apart(self) -> ContinualConfig:
        labels = [router.label for router in self.routers]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"routers: {', '.join(twice)} more than once: results could not be told apart; keep one")
        if self.joint is not None and self.joint.unit == "%":
            raise ValueError("joint: cannot be a percentage; use steps, epochs or samples")
        if self.arc is not None and self.arc.beta is not None and not isinstance(self.head, LinearHead):
            raise ValueError("arc.beta: only a linear head can go on learning; take head linear or leave beta out")
        return self

    @model_validator(mode="after")
    def _one_pass(self) -> ContinualConfig:
        if self.passes == 2:
            return self
        if not isinstance(self.adapt, Norms):
            raise ValueError(f"passes: 1 needs adapt norms, got '{self.adapt.name}': it is the LayerNorms that choose")
        if "routers" in self.model_fields_set:
            raise ValueError("routers: with passes 1 each LayerNorm chooses by itself; leave routers out")
        if self.objective.drop_path > 0:
            raise ValueError("objective.drop_path: must be 0 with passes 1, where each norm must see every image")
        if not self.warm_start:
            raise ValueError("warm_start: false has no meaning with passes 1, whose keys go on from task to task")
        if self.loop.compile or self.loop.activation_checkpointing != "none":
            raise ValueError("loop: passes 1 runs without compile and activation_checkpointing; leave them out")
        return self


class _Keyed(Supervised):
    """Cross-entropy minus the similarity to the keys of the task that learns (De Min et al. 2023, one pass)."""

    passing: Pass

    def forward(self, batch: Batch, target: float, progress: Progress) -> StepOutput:
        output = super().forward(batch, target, progress)
        similarity = self.passing.similarity()
        parts = {**output.parts, "similarity": similarity.detach() * target}
        return StepOutput(output.loss - similarity * target, parts)


class Learnt:
    """What a module's training leaves: adapter.safetensors, exactly as it learnt, and the head it learnt with."""

    def __init__(self, objective: Supervised) -> None:
        self._objective = objective

    def save(self, folder: Path) -> None:
        objective = self._objective
        base = {id(tensor) for tensor in objective.frozen().values()}
        state = objective.backbone.state_dict(keep_vars=True)
        values = gathered({name: tensor for name, tensor in state.items() if id(tensor) not in base})
        head = gathered(objective.head.state_dict())
        on_first(lambda: save_tensors(folder / ADAPTER, values, facts_of(objective.backbone)))
        on_first(lambda: save_tensors(folder / HEAD, head, {"pool": objective.config.pool}))


ADAPTER, HEAD = "adapter.safetensors", "head.safetensors"


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
        """Train the module of a task, unless that has been done; every rank must ask."""
        seeded(self.config.seed)
        objective = build(self.config, copy.deepcopy(self.source), self._classes)
        if task:
            before = self.folder(task - 1)
            objective.head.load_state_dict(read_tensors(before / HEAD)[0])
            if self.config.warm_start:
                fill(objective.backbone, read_tensors(before / ADAPTER)[0])
        self._train(self.config, self.folder(task), objective, self.tasks[task].labels, f"task {task}")

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
        return read_tensors(self.folder(task) / ADAPTER)[0]

    def plain(self, folder: Path) -> ViT:
        """A copy of the source with the module that a run folder holds, merged."""
        values, vit = read_tensors(folder / ADAPTER)[0], copy.deepcopy(self.source)
        adapt(vit, self.config.adapt)
        fill(vit, plain_names(values) if self.config.passes == 1 else values)
        self.config.adapt.settle(vit).merge(vit)
        return vit.requires_grad_(False).eval()

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
                run.finish(train(run, own, own.seed, objective, Learnt(objective), images, stage))


def build(config: ContinualConfig, vit: ViT, classes: int) -> Supervised:
    """Adapt a backbone, in place, for the module of a task, and put a fresh head on it."""
    if config.passes == 2:
        return finetune.build(config, Loaded(vit, None, {}), classes)
    passing = put_on(vit, [], config.seed)
    expects(vit, config.views)
    adapt(vit, config.adapt)
    objective = _Keyed(config.objective, vit, classes)
    objective.method, objective.passing = config.adapt, passing
    return objective


def task_folder(config: ContinualConfig, task: int) -> Path:
    """Where all of one task is."""
    return Path(config.out) / f"task{task:02d}"


def joint_folder(config: ContinualConfig) -> Path:
    """The run folder of training on all tasks at once."""
    return Path(config.out) / "joint"


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
