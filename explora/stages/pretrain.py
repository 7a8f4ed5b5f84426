"""`explora pretrain`: continue a backbone's self-supervised objective on unlabelled shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from explora import config as configs
from explora.adapt import AnyMethod, ExPLoRA, adapt
from explora.config import Overrides
from explora.data import MultiCrop, ShardSet
from explora.errors import ConfigError
from explora.models import ViT, load_model
from explora.objectives import DINOv2, DINOv2Config
from explora.runs import Run
from explora.stages.training import Trained, TrainingPlace, TrainingSection, announce, fit_views, logger, seeded, train


class PretrainSection(TrainingSection):
    """What to learn without labels, and which part of the backbone may change."""

    adapt: AnyMethod = ExPLoRA()
    """Which part of the backbone may change, and how."""
    objective: DINOv2Config = DINOv2Config()
    """Student, teacher and their losses."""
    views: MultiCrop = MultiCrop()
    """The crops made of an image; sizes, mean and std that are left out follow the backbone."""


class PretrainConfig(TrainingPlace, PretrainSection):
    """Config of `explora pretrain`."""

    shards: str
    """Folder that `explora pack` wrote; labels in it are not looked at."""


def pretrain(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> Trained:
    """Pretrain from a config file or mapping; goes on from the newest checkpoint of an unfinished run.

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folder.
    """
    config = configs.load(PretrainConfig, source, overrides)
    seeded(config.seed)
    shards = ShardSet.open(config.shards)
    vit, account = load_model(config.model)
    config = config.model_copy(update={"views": fit_views(config.views, vit)})
    with Run.open(config.out, config) as run:
        if run.summary is not None:
            logger.info("%s: already finished", config.out)
            return Trained.of(run, run.summary)
        announce(vit, account)
        summary = train(run, config, config.seed, build(config, vit), shards, "pretrain")
        return Trained.of(run, run.finish(summary))


def build(section: PretrainSection, vit: ViT) -> DINOv2:
    """Adapt the backbone and put the objective around it.

    Raises:
        ConfigError: the method leaves the whole backbone as it is.
    """
    if not adapt(vit, section.adapt):
        raise ConfigError(f"adapt: '{section.adapt.name}' trains nothing of the backbone; choose explora, lora or full")
    return DINOv2(section.objective, vit, section.batch_size)
