"""`explora finetune`: supervised fine-tuning of a backbone with labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from explora import config as configs
from explora.adapt import AnyMethod, LoRA, adapt
from explora.config import Overrides
from explora.data import Crop
from explora.distributed import gathered, on_first
from explora.errors import ConfigError, DataError
from explora.models import Loaded, load_model
from explora.models.export import save_tensors
from explora.objectives import Supervised, SupervisedConfig
from explora.stages.fitting import expects
from explora.stages.result import Result
from explora.stages.section import TrainingPlace, TrainingSection, fitted, refuse_idle
from explora.stages.sources import local_set, refuse_strange_sets
from explora.stages.training import Trained, announce, logger, opened, seeded, together, train


class FinetuneSection(TrainingSection):
    """What to learn from labels, and which part of the backbone may change."""

    adapt: AnyMethod = LoRA()
    """Which part of the backbone may change, and how."""
    objective: SupervisedConfig = SupervisedConfig()
    """The head and its loss."""
    views: Crop = Crop()
    """The crop made of an image; size, mean and std that are left out follow the backbone."""


class FinetuneConfig(TrainingPlace, FinetuneSection):
    """Config of `explora finetune`."""

    train: str
    """Labelled shards that `explora pack` wrote."""


def finetune(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> Trained:
    """Fine-tune from a config file or mapping; goes on from the newest checkpoint of an unfinished run.

    Beside the backbone it writes head.safetensors (weight, bias; metadata: pool, classes).

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folder.
    """
    config = configs.load(FinetuneConfig, source, overrides)
    with together(config.loop):
        return _finetune(config)


def _finetune(config: FinetuneConfig) -> Trained:
    seeded(config.seed)
    shards = local_set(config.train, config.scratch)
    if shards.classes is None:
        raise DataError(f"{config.train}: has no labels; fine-tuning needs one folder per class before packing")
    loaded = load_model(config.model)
    config = fitted(config, loaded.vit, shards.pixels)
    refuse_strange_sets(shards, config.views)
    objective = build(config, loaded, len(shards.classes))
    refuse_idle(config, objective, len(shards))
    with opened(config) as run:
        done = on_first(lambda: run.summary)
        if done is not None:
            logger.info("%s: already finished", config.out)
            return Trained.of(run, done)
        announce(loaded.vit, loaded.account)
        result = Result(objective, config.adapt)
        summary = train(run, config, config.seed, objective, result, shards, "finetune")
        head = gathered(objective.head.state_dict())
        facts = {"pool": config.objective.pool, "classes": shards.classes}
        on_first(lambda: save_tensors(run.folder / "head.safetensors", head, facts))
        return Trained.of(run, run.finish(summary))


def build(section: FinetuneSection, source: Loaded, classes: int) -> Supervised:
    """Adapt the backbone and put a fresh head on it."""
    if (section.objective.mixup > 0 or section.objective.cutmix > 0) and section.images_at_once % 2:
        raise ConfigError(
            "objective.mixup: mixup and CutMix mix pairs, but a micro-batch of a rank has "
            f"{section.images_at_once} images; choose an even batch_size / micro_batches / ranks"
        )
    if section.objective.pool == "mean" and not section.adapt.reaches_patches:
        raise ConfigError(
            f"adapt: '{section.adapt.name}' changes the class token alone, but objective.pool is mean, that of patch "
            "tokens; set objective.pool: cls or cls_mean"
        )
    vit = source.vit
    expects(vit, section.views)
    adapt(vit, section.adapt)
    objective = Supervised(section.objective, vit, classes)
    objective.method = section.adapt
    return objective
