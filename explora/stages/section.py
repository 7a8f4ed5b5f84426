"""What the configs of training stages have in common, and what is wrong with one before there is any work to lose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from pydantic import Field, field_validator, model_validator

from explora import config as configs
from explora.adapt import AnyMethod
from explora.bands import Pixels
from explora.config import Config
from explora.data import AnyStream, AnyViews, Order, RemoteSet, RemoteStream, Stream
from explora.distributed import rank, size
from explora.engine import LoopConfig, OptimConfig, parameter_groups
from explora.errors import ConfigError
from explora.models import Loaded, ModelConfig, ViT, load_model
from explora.objectives import Objective
from explora.schedules import Length, LengthField, Progress
from explora.stages.fitting import fit_views
from explora.stages.sources import AnySet

S = TypeVar("S", bound="TrainingSection")


class TrainingSection(Config):
    """What every training stage has."""

    steps: LengthField = Length(10, "epochs")
    """Length of the run: `1000`, `"5 epochs"`, `"200000 samples"`."""
    batch_size: int = Field(32, ge=1)
    """Images of one optimizer step, over all ranks and micro-batches."""
    micro_batches: int = Field(1, ge=1)
    """Parts that each rank cuts its images of a step into to save memory; gradients are those of the whole batch."""
    workers: int = Field(0, ge=0, json_schema_extra=configs.free)
    """Processes on each rank that decode and crop; 0 does it in the main one."""
    order: Order = Order()
    """In which order images come."""
    max_corrupt: float = Field(0.001, ge=0, lt=1)
    """Share of images that may turn out unreadable, and are skipped, before the run stops."""
    scratch: str | None = Field(None, json_schema_extra=configs.free)
    """Folder on each node's own disk that shards are copied to first; null reads them where they are."""
    adapt: AnyMethod
    """Which part of the backbone may change, and how."""
    views: AnyViews
    """What is made of an image; bands, sizes, mean and std that are left out follow the backbone."""
    optim: OptimConfig = OptimConfig()
    """Learning rates, their schedule and weight decay."""
    loop: LoopConfig = LoopConfig()
    """Device, precision, and how often to log and to save."""

    @field_validator("steps")
    @classmethod
    def _absolute(cls, steps: Length) -> Length:
        if steps.unit == "%":
            raise ValueError("the length of the run itself cannot be a percentage; use steps, epochs or samples")
        return steps

    @model_validator(mode="after")
    def _equal_parts(self) -> TrainingSection:
        if self.batch_size % self.micro_batches:
            raise ValueError(f"batch_size {self.batch_size} cannot be cut into {self.micro_batches} micro_batches")
        return self

    @model_validator(mode="after")
    def _whole_on_every_rank(self) -> TrainingSection:
        loop = self.loop
        if self.adapt.whole and (loop.parallel in ("fsdp", "hsdp") or loop.shard != "auto"):
            raise ValueError(
                f"adapt '{self.adapt.name}' needs all that learns whole on every rank; take ddp or auto for "
                "loop.parallel, and leave loop.shard out"
            )
        return self

    @property
    def images_at_once(self) -> int:
        """Images of one micro-batch on one rank.

        Raises:
            ConfigError: a step cannot be cut equally.
        """
        parts = self.micro_batches * size()
        if self.batch_size % parts:
            low = max(1, self.batch_size // parts) * parts
            raise ConfigError(
                f"batch_size: {self.batch_size} images cannot be cut into {self.micro_batches} micro_batches on each "
                f"of {size()} ranks; use {low} or {low + parts}, or other micro_batches"
            )
        return self.batch_size // parts

    def stream(self, images: AnySet, seed: int) -> AnyStream:
        """This rank's micro-batches of the run, in its order.

        Raises:
            ConfigError: classes are to be balanced, but the images are remote.
        """
        if isinstance(images, RemoteSet) and self.order.balance:
            raise ConfigError("order.balance: remote images have no labels here to balance; set it to 0")
        make = (
            partial(Stream, images, order=self.order)
            if not isinstance(images, RemoteSet)
            else partial(RemoteStream, images)
        )
        return make(
            self.views,
            batch_size=self.batch_size,
            seed=seed,
            workers=self.workers,
            micro_batches=self.micro_batches,
            rank=rank(),
            ranks=size(),
            max_corrupt=self.max_corrupt,
        )


class TrainingPlace(Config):
    """Where a training stage reads and writes."""

    out: str
    """Run folder; running again goes on from its newest checkpoint."""
    seed: int = Field(0, ge=0)
    """Everything random hangs on it."""
    model: ModelConfig
    """The backbone to start from."""


def blueprint(model: ModelConfig) -> Loaded:
    """The backbone on tensors without memory; a weights file is read and must fit, timm's are not fetched.

    Raises:
        WeightsError: as `load_model`.
    """
    if model.weights in (None, "timm"):
        with torch.device("meta"):
            return load_model(model.model_copy(update={"weights": None}))
    loaded = load_model(model)
    loaded.vit.to("meta")
    return loaded


def rehearse(section: S, source: Loaded, build: Callable[[S, Loaded], Objective]) -> Objective:
    """Go through a stage's beginning with a `blueprint`, to meet its mistakes before there is any work to lose.

    Raises:
        ConfigError: views, method, objective, length or optimizer rules do not fit the backbone.
    """
    with torch.device("meta"):
        objective = build(fitted(section, source.vit), source)
    parameter_groups(section.optim, objective, section.batch_size)
    if section.steps.unit != "epochs":  # nobody has counted the images yet
        refuse_idle(section, objective, samples=section.batch_size)
    return objective


def fitted(section: S, vit: ViT, pixels: Pixels | None = None) -> S:
    """The section with the views that it will use.

    Raises:
        ConfigError, DataError: see `fit_views`.
    """
    return section.model_copy(update={"views": fit_views(section.views, vit, pixels)})


def refuse_idle(section: TrainingSection, objective: Objective, samples: int) -> None:
    """Refuse a run over a set of so many images that would leave the backbone as it is.

    Raises:
        ConfigError: no step at all, or the heads learn alone to the end.
    """
    progress = progress_of(section, samples)
    if objective.lr_scale("backbone", progress._replace(step=progress.steps - 1)) <= 0:
        raise ConfigError(
            f"objective: head_warmup and backbone_ramp leave the backbone a rate of 0 in all {progress.steps} steps, "
            "so it would learn nothing; shorten them"
        )


def progress_of(config: TrainingSection, samples: int) -> Progress:
    """The run's length in steps for a set of so many images.

    Raises:
        ConfigError: no step at all.
    """
    steps = config.steps.steps(batch=config.batch_size, samples=samples)
    if steps < 1:
        raise ConfigError(f"steps: {config.steps} is less than one step")
    return Progress(0, steps, config.batch_size, samples)
