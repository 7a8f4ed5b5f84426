"""What the configs of training stages have in common, and what is wrong with one before there is any work to lose."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from pydantic import Field, field_validator, model_validator

from explora import config as configs
from explora.adapt import AnyMethod
from explora.bands import RGB, Pixels, Scaling
from explora.config import Config
from explora.data import (
    AnyStream,
    AnyViews,
    Order,
    RemoteSet,
    RemoteStream,
    Stream,
    Views,
    normalisation,
    settle,
    whole_range,
)
from explora.distributed import rank, size
from explora.engine import LoopConfig, OptimConfig, parameter_groups
from explora.errors import ConfigError
from explora.models import Loaded, ModelConfig, ViT, load_model
from explora.objectives import Objective
from explora.schedules import Length, LengthField, Progress
from explora.stages.sources import AnySet

V = TypeVar("V", bound=Views)
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
        """This rank's micro-batches of the run, in its order."""
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


def fit_views(views: V, vit: ViT, pixels: Pixels | None = None) -> V:
    """Fill what the config left open with the backbone's own: bands, patch size, image size, mean and std.

    Args:
        pixels: what the images' values mean; the range that becomes [0, 1] is settled by their statistics where
            neither the config nor the backbone says one. None where they are not known yet.

    Raises:
        ConfigError: a crop size does not fit the patches, or the bands or the range not the backbone.
        DataError: statistics are needed, but the shards have none.
    """
    patch = vit.patch_size
    bands = _bands(views, vit, pixels)
    scaled: Views = views.model_copy(update={"bands": bands})
    if pixels is not None:
        scaled = settle(scaled, pixels, vit.scaling)
    mean, std = _normalisation(vit, scaled, pixels)
    facts = {
        "bands": bands,
        "mean": mean,
        "std": std,
        "patch_size": patch,
        "groups": vit.groups,
        "size": vit.image_size,
        "global_size": vit.image_size,
        "local_size": max(1, round(vit.image_size * 3 / 7 / patch)) * patch,
    }
    open_fields = {
        name: value
        for name, value in facts.items()
        if name in type(views).model_fields and name not in views.model_fields_set
    }
    given = views.model_dump(exclude_unset=True)
    fit = configs.validate(type(views), {**given, **open_fields, "scaling": scaled.scaling}, "views")
    written = fit.model_dump()
    for key, own in (("patch_size", patch), ("groups", vit.groups)):
        if written.get(key, own) != own:
            raise ConfigError(f"views.{key}: {written[key]}, but that of {vit.name} is {own}; leave it out")
    _refuse_sides(fit, patch)
    return fit


def _bands(views: Views, vit: ViT, pixels: Pixels | None) -> tuple[str, ...]:
    if "bands" in views.model_fields_set:
        if len(views.bands) != vit.channels or vit.bands not in (None, views.bands):
            own = ", ".join(vit.bands) if vit.bands else f"{vit.channels} channels"
            raise ConfigError(f"views.bands: {', '.join(views.bands)}, but {vit.name} takes {own}; set model.bands")
        return views.bands
    if vit.bands is not None:
        return vit.bands
    if pixels is None or len(pixels.names) == vit.channels:
        return pixels.names if pixels else tuple(f"band{number}" for number in range(vit.channels))
    raise ConfigError(
        f"model.bands is needed: {vit.name} takes {vit.channels} channels, and nothing says which of "
        f"{', '.join(pixels.names)} they are"
    )


def _normalisation(vit: ViT, views: Views, pixels: Pixels | None) -> tuple[tuple[float, ...], ...]:
    """Mean and std of the scaled bands: the backbone's where it has seen such, else those of the images."""
    scaling = views.scaling
    known = vit.scaling or (whole_range(RGB) if vit.bands == RGB else None)  # weights of others have seen photographs
    if pixels is None or not isinstance(scaling, Scaling) or scaling == known:
        return vit.mean, vit.std
    return normalisation(pixels, scaling, views.bands)


def _refuse_sides(views: Views, patch: int) -> None:
    for side in views.sides():
        if side < 2 * patch:
            raise ConfigError(
                f"views: a crop of {side} px is less than two patches of {patch} px; use {2 * patch} or more"
            )
        if side % patch:
            low = max(1, side // patch) * patch
            raise ConfigError(
                f"views: a crop of {side} px is no multiple of the patch size {patch}; use {low} or {low + patch}"
            )


def expects(vit: ViT, views: Views) -> None:
    """Record in a backbone what it learns from, which is what it expects from now on."""
    vit.mean, vit.std, vit.bands = views.mean, views.std, views.bands
    vit.scaling = views.scaling if isinstance(views.scaling, Scaling) else None


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
