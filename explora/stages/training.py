"""What pretraining and fine-tuning share: from an adapted backbone to exported files."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, field_validator, model_validator

from explora import config as configs
from explora.adapt import AnyMethod, Method
from explora.config import Config
from explora.data import AnyViews, ShardSet, Stream, Views
from explora.distributed import precision_on
from explora.engine import LoopConfig, Monitor, OptimConfig, Optimizer, Seen, Training, parameter_groups
from explora.errors import ConfigError
from explora.models import Account, Loaded, ModelConfig, ViT, load_model
from explora.models.export import save_adapter, save_backbone
from explora.objectives import Objective
from explora.runs import Run
from explora.schedules import Length, LengthField, Progress

logger = logging.getLogger("explora")
V = TypeVar("V", bound=Views)
S = TypeVar("S", bound="TrainingSection")

CHANNELS = 3
"""What `explora pack` writes: red, green, blue."""


class TrainingSection(Config):
    """What every training stage has."""

    steps: LengthField = Length(10, "epochs")
    """Length of the run: `1000`, `"5 epochs"`, `"200000 samples"`."""
    batch_size: int = Field(32, ge=1)
    """Images of one optimizer step, over all micro-batches."""
    micro_batches: int = Field(1, ge=1)
    """Parts a step is cut into to save memory; the gradients are those of the whole batch."""
    workers: int = Field(0, ge=0)
    """Processes that decode and crop; 0 does it in the main one."""
    adapt: AnyMethod
    """Which part of the backbone may change, and how."""
    views: AnyViews
    """What is made of an image; sizes, mean and std that are left out follow the backbone."""
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

    def stream(self, shards: ShardSet, seed: int) -> Stream:
        """The micro-batches of the run, in its order."""
        return Stream(
            shards,
            self.views,
            batch_size=self.batch_size,
            seed=seed,
            workers=self.workers,
            micro_batches=self.micro_batches,
        )


class TrainingPlace(Config):
    """Where a training stage reads and writes."""

    out: str
    """Run folder; running again goes on from its newest checkpoint."""
    seed: int = Field(0, ge=0)
    """Everything random hangs on it."""
    model: ModelConfig
    """The backbone to start from."""


@dataclass(frozen=True)
class Trained:
    """What a training stage leaves."""

    folder: Path
    backbone: Path
    adapter: Path
    summary: dict[str, Any]

    @classmethod
    def of(cls, run: Run, summary: dict[str, Any]) -> Trained:
        return cls(run.folder, run.folder / "backbone.safetensors", run.folder / "adapter.safetensors", summary)


def fit_views(views: V, vit: ViT) -> V:
    """Fill what the config left open with the backbone's own: patch size, image size, mean and std.

    Raises:
        ConfigError: a crop size does not fit the patches.
    """
    patch = vit.patch_size
    facts = {
        "mean": vit.mean,
        "std": vit.std,
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
    fit = configs.validate(type(views), {**views.model_dump(exclude_unset=True), **open_fields}, "views")
    written = fit.model_dump()
    for key, own in (("patch_size", patch), ("groups", vit.groups)):
        if written.get(key, own) != own:
            raise ConfigError(f"views.{key}: {written[key]}, but that of {vit.name} is {own}; leave it out")
    for side in fit.sides():
        if side < 2 * patch:
            raise ConfigError(
                f"views: a crop of {side} px is less than two patches of {patch} px; use {2 * patch} or more"
            )
        if side % patch:
            low = max(1, side // patch) * patch
            raise ConfigError(
                f"views: a crop of {side} px is no multiple of the patch size {patch}; use {low} or {low + patch}"
            )
    return fit


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


def fitted(section: S, vit: ViT) -> S:
    """The section with the views that it will use.

    Raises:
        ConfigError: see `fit_views`.
    """
    return section.model_copy(update={"views": fit_views(section.views, vit)})


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


def refuse_channels(vit: ViT) -> None:
    """Refuse to feed a model what its patch embedding does not take.

    Raises:
        ConfigError: it is made for other than the three channels that shards have.
    """
    if vit.channels != CHANNELS:
        raise ConfigError(f"model.options.in_chans: {vit.channels}, but images in shards have {CHANNELS} channels")


def train(
    run: Run,
    config: TrainingSection,
    seed: int,
    objective: Objective,
    shards: ShardSet,
    stage: str,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Train to the end and export the result; returns the summary, which the caller writes last."""
    progress = progress_of(config, len(shards))
    optimizer = Optimizer(config.optim, objective, config.batch_size)
    stream = config.stream(shards, seed)
    training = Training(config.loop, run, objective, optimizer, stream, config.views, progress, seed, monitor)
    objective.to(training.device)
    counts = parameter_counts(objective)
    logger.info(
        "%s: %d steps of %d images on %s; %s of %s backbone parameters train%s; peak lr %.2e",
        *(stage, progress.steps, config.batch_size, training.device),
        *(f"{counts['trained_parameters']:,}", f"{counts['total_parameters']:,}"),
        f", alpha / rank {config.adapt.scale:g}" if config.adapt.scale is not None else "",
        config.optim.peak(config.optim.lr, config.batch_size),
    )
    outcome = training.fit()
    export(run.folder, objective, config.adapt)
    logger.info("%s: done in %.0f s; %s", stage, outcome.seconds, run.folder / "backbone.safetensors")
    images = progress.steps * config.batch_size
    return {
        "stage": stage,
        "model": objective.backbone.name,
        "data": {"name": shards.name, "samples": len(shards), "fingerprint": shards.fingerprint},
        "method": config.adapt.name,
        "objective": type(objective).__name__.lower(),
        **counts,
        "seconds": round(outcome.seconds, 2),
        "steps": progress.steps,
        "images": images,
        "images_per_second": round(images / outcome.seconds, 2),
        "precision": precision_on(training.device, config.loop.precision),
        "skipped_steps": outcome.skipped,
        "alpha_over_rank": config.adapt.scale,
        "trained": families(learning(objective.backbone)),
        **({} if outcome.seen is None or outcome.seen.floor is None else watched(outcome.seen)),
    }


def watched(seen: Seen) -> dict[str, Any]:
    """What the monitor saw: kNN before the first step, at its best and at the end, percent."""
    return {
        "knn_floor": seen.floor,
        "knn_best": seen.best,
        "knn_best_step": seen.best_step,
        "knn_last": seen.last,
        "monitor_seconds": round(seen.seconds, 2),
    }


def announce(vit: ViT, account: Account | None) -> None:
    """Log what the backbone's weights are; random ones are rarely meant."""
    if account is None:
        logger.warning("%s: random weights, because model.weights is not given", vit.name)
    else:
        logger.info("%s: %s", vit.name, account)


def progress_of(config: TrainingSection, samples: int) -> Progress:
    """The run's length in steps for a set of so many images.

    Raises:
        ConfigError: no step at all.
    """
    steps = config.steps.steps(batch=config.batch_size, samples=samples)
    if steps < 1:
        raise ConfigError(f"steps: {config.steps} is less than one step")
    return Progress(0, steps, config.batch_size, samples)


def parameter_counts(objective: Objective) -> dict[str, int]:
    """Parameters of the backbone that train, all of them after merging, those of the heads, and all that learns."""
    named = list(objective.backbone.named_parameters())
    return {
        "trained_parameters": sum(p.numel() for _, p in named if p.requires_grad),
        "total_parameters": sum(p.numel() for name, p in named if "lora_" not in name),
        "head_parameters": sum(p.numel() for head in objective.heads for p in head.parameters()),
        "learning_parameters": sum(p.numel() for p in objective.parameters() if p.requires_grad),
    }


def families(names: Iterable[str]) -> list[str]:
    """Parameter names to read: numbers collapsed where one kind of layer has them in many places."""
    low_rank = re.compile(r"(^|\.)blocks\.\d+\.(norm\d|attn\.(?:qkv|proj)\.lora|mlp\.fc\d\w*\.lora).*")
    short = (low_rank.sub(r"\1blocks.*.\2*", name) for name in names)
    return list(dict.fromkeys(re.sub(r"^(patch_embed|pred)\..*", r"\1.*", name) for name in short))


def learning(vit: ViT) -> list[str]:
    """Names of the parameters that learn."""
    return [name for name, p in vit.named_parameters() if p.requires_grad]


def export(folder: Path, objective: Objective, method: Method) -> None:
    """Write the merged backbone and the adapter alone; the folder is made where it is not there."""
    folder.mkdir(exist_ok=True)
    save_adapter(
        folder / "adapter.safetensors", objective.result, learning(objective.backbone), method.model_dump(mode="json")
    )
    merged = copy.deepcopy(objective.result)
    method.merge(merged)
    save_backbone(folder / "backbone.safetensors", merged)


def seeded(seed: int) -> None:
    """Fresh weights (heads, low-rank factors) hang on the seed."""
    torch.manual_seed(seed)
