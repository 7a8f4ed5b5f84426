"""`explora pretrain`: continue a backbone's self-supervised objective on unlabelled shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from explora import config as configs
from explora.adapt import APT, AnyMethod, ExPLoRA, adapt
from explora.config import Overrides
from explora.data import Center, Key, MaskedCrop, Mixture, MultiCrop, RemoteSet, ShardSet, crops
from explora.distributed import autocast, on_first
from explora.engine import Monitor, MonitorConfig
from explora.errors import ConfigError
from explora.models import Loaded, load_model
from explora.objectives import MAE, DINOv2, DINOv2Config, MAEConfig, Objective
from explora.runs import save_arrays
from explora.stages.fitting import expects, fit_views
from explora.stages.result import Result
from explora.stages.section import TrainingPlace, TrainingSection, fitted, refuse_idle
from explora.stages.sources import AnySet, Sources, opened_set, refuse_strange_sets
from explora.stages.training import Trained, announce, logger, opened, seeded, together, train

_VIEWS = {"dinov2": "multicrop", "mae": "masked_crop"}
"""The views that each objective learns from."""
_PICTURES = 8


class PretrainSection(TrainingSection):
    """What to learn without labels, and which part of the backbone may change."""

    adapt: AnyMethod = ExPLoRA()
    """Which part of the backbone may change, and how."""
    objective: Annotated[DINOv2Config | MAEConfig, Field(discriminator="name")] = DINOv2Config()
    """What is learnt: `dinov2` (the default) or `mae`, best the one that the weights come from."""
    views: Annotated[MultiCrop | MaskedCrop, Field(discriminator="name")] = MultiCrop()
    """The crops made of an image; sizes, mean and std that are left out follow the backbone."""
    monitor: MonitorConfig | None = MonitorConfig()
    """How the backbone's features are watched while it learns; null does not watch."""

    @model_validator(mode="before")
    @classmethod
    def _name_what_follows(cls, given: Any) -> Any:
        """`objective` is DINOv2 unless it says otherwise, and `views` are those that it learns from."""
        if not isinstance(given, Mapping):
            return given
        objective, views = given.get("objective", {}), given.get("views", {})
        if isinstance(objective, Mapping):
            objective = {"name": "dinov2", **objective}
            known = _VIEWS.get(str(objective["name"]))
            if known is not None and isinstance(views, Mapping):
                views = {"name": known, **views}
        return {**given, "objective": objective, "views": views}

    @model_validator(mode="after")
    def _views_of_the_objective(self) -> PretrainSection:
        fits = _VIEWS[self.objective.name]
        if self.views.name != fits:
            raise ValueError(f"objective '{self.objective.name}' learns from the views '{fits}'; leave views.name out")
        return self


class PretrainConfig(TrainingPlace, PretrainSection):
    """Config of `explora pretrain`."""

    shards: Sources
    """Folder that `explora pack` wrote, several as [{path, weight}, ...], or tars from afar as a URL or {urls, ...};
    labels in them only serve the monitor, they never teach."""


def pretrain(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> Trained:
    """Pretrain from a config file or mapping; goes on from the newest checkpoint of an unfinished run.

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folder.
    """
    config = configs.load(PretrainConfig, source, overrides)
    with together(config.loop):
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> Trained:
    seeded(config.seed)
    images = opened_set(config.shards, config.scratch)
    loaded = load_model(config.model)
    config = fitted(config, loaded.vit, images.pixels)
    refuse_strange_sets(images, config.views)
    objective = build(config, loaded)
    refuse_idle(config, objective, len(images))
    with opened(config) as run:
        done = on_first(lambda: run.summary)
        if done is not None:
            logger.info("%s: already finished", config.out)
            return Trained.of(run, done)
        announce(loaded.vit, loaded.account)
        if isinstance(objective, MAE) and objective.decoder.anew:
            logger.info("weights: %s", objective.decoder.anew)
        result = Result(objective, config.adapt)
        watch = _monitor(config, objective, images, lambda: result.save(run.folder / "best"))
        summary = train(run, config, config.seed, objective, result, images, "pretrain", watch)
        if not isinstance(images, RemoteSet):
            _show(run.folder, objective, config, images)
        return Trained.of(run, run.finish(summary))


def build(section: PretrainSection, source: Loaded) -> Objective:
    """Adapt the backbone and put the objective around it.

    Raises:
        ConfigError: the method leaves the whole backbone as it is, or something random in it, or does not fit the
            objective.
    """
    vit = source.vit
    expects(vit, section.views)
    if not adapt(vit, section.adapt):
        raise ConfigError(f"adapt: '{section.adapt.name}' trains nothing of the backbone; choose explora, lora or full")
    fresh = () if source.account is None else source.account.fresh
    random = [name for name in fresh if name.startswith("patch_embed.") and not vit.get_parameter(name).requires_grad]
    if random:
        raise ConfigError(
            f"adapt.patch_embed: the weights have no patch embedding for these bands, so {random[0]} and others begin "
            "anew and must learn; set it to true"
        )
    _refuse_still_patches(section)
    objective = _around(section, source)
    objective.method = section.adapt
    return objective


def _refuse_still_patches(section: PretrainSection) -> None:
    """Refuse to learn from patch tokens that the method leaves as they are, or to hold them to a changed source."""
    method, objective = section.adapt, section.objective
    learns = "MAE learns from patch tokens" if isinstance(objective, MAEConfig) else ""
    if isinstance(objective, DINOv2Config) and objective.gram_weight > 0:
        learns = "objective.gram_weight holds patch tokens to the source's"
        if isinstance(method, APT) and not method.gate:
            raise ConfigError(
                "objective.gram_weight: holds patch tokens to the source's, but 'apt' without its gate begins as "
                "another model; set adapt.gate: true or gram_weight: 0"
            )
    if learns and not method.reaches_patches:
        raise ConfigError(
            f"adapt: '{method.name}' changes the class token alone, but {learns}; take dinov2 without gram_weight, or "
            "a method such as lora"
        )


def _around(section: PretrainSection, source: Loaded) -> Objective:
    if isinstance(section.objective, MAEConfig):
        return MAE(section.objective, source.vit, source.decoder, source.decoder_heads)
    if source.vit.groups > 1:
        raise ConfigError("objective.name: 'dinov2' masks whole patches, not channel groups; use 'mae' with them")
    return DINOv2(section.objective, source.vit, section.batch_size, section.images_at_once)


def _monitor(
    config: PretrainConfig, objective: Objective, images: AnySet, on_best: Callable[[], None]
) -> Monitor | None:
    if config.monitor is None:
        return None
    seen = watched(config.monitor, images)
    view = fit_views(Center(), objective.backbone, seen.pixels)
    if config.monitor.shards not in (None, config.shards):
        refuse_strange_sets(seen, view)
    return Monitor(config.monitor, seen, view, on_best)


def watched(config: MonitorConfig, images: AnySet) -> ShardSet | Mixture:
    """What the monitor looks at, beside the images to learn from.

    Raises:
        ConfigError: these cannot be looked at again.
    """
    seen = images if config.shards is None else ShardSet.open(config.shards)
    if isinstance(seen, RemoteSet):
        raise ConfigError(
            "monitor.shards is needed: images from afar cannot be looked at again; or set monitor to null"
        )
    return seen


def _show(folder: Path, objective: Objective, config: PretrainConfig, shards: ShardSet | Mixture) -> None:
    """Leave the pictures of an objective that has some: uint8 (n, H, W, C) by name, of images all over the set."""
    chosen = np.linspace(0, len(shards) - 1, min(_PICTURES, len(shards)), dtype=int).tolist()
    batch = crops(shards, config.views, [Key(config.seed, 0, index) for index in chosen])
    device = next(objective.parameters()).device
    batch = {name: value.to(device) for name, value in (batch | config.views.step(config.seed, 0, len(chosen))).items()}
    with autocast(device, config.loop.precision):
        pictures = objective.pictures(config.views.finish(batch))
    if pictures:
        arrays = {name: config.views.pixels(images.float()) for name, images in pictures.items()}
        on_first(lambda: save_arrays(folder / "pictures.npz", arrays))
