"""The config of `explora continual`, and where its tasks leave what they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from explora.adapt import AnyMethod, Method, Norms
from explora.engine import OptimConfig
from explora.incremental.arc import ARC
from explora.incremental.heads import AnyHead, LinearHead
from explora.incremental.routers import AnyRouter, Keys
from explora.incremental.tasks import TasksConfig
from explora.objectives import SupervisedConfig
from explora.schedules import Length, LengthField
from explora.stages.finetune import LabelSection
from explora.stages.section import TrainingPlace


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


class ContinualConfig(TrainingPlace, LabelSection):
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
    """Whether a module starts as that of the task before; one with gates, which stay closed, always starts anew."""
    joint: LengthField | None = Length(10, "epochs")
    """Length of training on all tasks at once, to compare with, under the same `optim`; null leaves it out."""
    steps: LengthField = Length(5, "epochs")
    """Length of the training of each task's module, in its own images."""
    adapt: AnyMethod = Norms()
    """What a module is: which part of the backbone a task may change, and how."""
    objective: SupervisedConfig = SupervisedConfig(pool="cls", label_smoothing=0)
    """The loss of a module's training; `pool` is also what the head is given."""
    optim: TaskOptim = TaskOptim()
    """Learning rates, their schedule and weight decay."""

    @property
    def goes_on(self) -> bool:
        """Whether a module starts as that of the task before: not where training has closed gates for good."""
        return self.warm_start and type(self.adapt).settle is Method.settle

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


def task_folder(config: ContinualConfig, task: int) -> Path:
    """Where all of one task is."""
    return Path(config.out) / f"task{task:02d}"


def joint_folder(config: ContinualConfig) -> Path:
    """The run folder of training on all tasks at once."""
    return Path(config.out) / "joint"
