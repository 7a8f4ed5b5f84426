"""`explora run`: the chain from raw images to the report."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from explora import config as configs
from explora.config import Config, Overrides
from explora.data import ShardSet
from explora.errors import DataError
from explora.models import ModelConfig
from explora.reporting import table, write_report
from explora.runs import Run
from explora.stages.finetune import FinetuneSection, finetune
from explora.stages.finetune import build as build_finetune
from explora.stages.pack import pack, recipe_of
from explora.stages.pretrain import PretrainSection, pretrain
from explora.stages.pretrain import build as build_pretrain
from explora.stages.probe import ProbeSection, check_source, judge
from explora.stages.training import blueprint, logger, refuse_channels, rehearse


class DataConfig(Config):
    """Folders of images, or of shards that `explora pack` wrote; folders are packed into the run."""

    pretrain: str | None = None
    """Target images to pretrain on, labelled or not; null takes those of `train`."""
    train: str
    """Labelled target images to fit probes and to fine-tune on."""
    test: str
    """Labelled target images that only judge."""
    source_train: str | None = None
    """Labelled source-domain images to fit probes on: with these the report says what was forgotten."""
    source_test: str | None = None
    """Labelled source-domain images that only judge."""
    recipe: str = "folder"
    """How the folders are laid out."""

    @model_validator(mode="after")
    def _whole_source(self) -> DataConfig:
        check_source(self.source_train, self.source_test)
        return self

    def folders(self) -> dict[str, str]:
        """What is given, by role."""
        return {role: folder for role, folder in self if role != "recipe" and folder is not None}


class RunConfig(Config):
    """Config of `explora run`: the whole chain in one file."""

    out: str
    """Folder of the chain; running again goes on where it stopped."""
    seed: int = Field(0, ge=0)
    """Everything random in all stages hangs on it."""
    model: ModelConfig
    """The backbone that all begins with, and that the others are compared with."""
    data: DataConfig
    """Where the images are."""
    pretrain: PretrainSection = PretrainSection()
    """How to pretrain, with the settings of `explora pretrain`."""
    finetune: FinetuneSection | None = FinetuneSection()
    """How to fine-tune, with the settings of `explora finetune`; null leaves it out."""
    probe: ProbeSection = ProbeSection()
    """How to judge, with the settings of `explora probe`."""


def run(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> Path:
    """Pack, pretrain, fine-tune, probe and report; finished training is not repeated, features come from the cache.

    Returns:
        The report's path.

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folders.
    """
    config = configs.load(RunConfig, source, overrides)
    out = Path(config.out)
    with Run.open(out, config) as chain:
        _rehearse(config, out / "shards")
        shards = _shards(out / "shards", config.data)
        models = _train(config, shards.pop("pretrain", shards["train"]), shards["train"])
        judge({**_given(config, "probe"), "models": models, **shards})
        chain.finish({"stage": "run"})
        return report(out)


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the HTML report of a chain and log its table; returns the report's path.

    Raises:
        RunError: the folder holds no run, or a damaged one.
    """
    path = write_report(Path(folder), None if out is None else Path(out))
    logger.info("\n%s\n\nreport: %s", table(Path(folder)), path)
    return path


def _rehearse(config: RunConfig, shards: Path) -> None:
    """Meet now the mistakes that the last stage would meet after hours."""
    counts = {}
    for role, origin in config.data.folders().items():
        if (shards / role).exists():
            origin = str(shards / role)
        classes = ShardSet.open(origin).classes if _packed(origin) else recipe_of(config.data.recipe)(origin)[0]
        if classes is None and role != "pretrain":
            raise DataError(f"data.{role}: {origin} has no labels; the probe needs one folder per class")
        counts[role] = len(classes or ())
    source = blueprint(config.model)
    refuse_channels(source.vit)
    rehearse(config.pretrain, copy.deepcopy(source), build_pretrain)
    if config.finetune is not None:
        rehearse(config.finetune, source, partial(build_finetune, classes=counts["train"]))


def _given(config: RunConfig, stage: str) -> dict[str, Any]:
    """What the user wrote for a stage, with its seed and its folder."""
    section = getattr(config, stage).model_dump(mode="json", exclude_unset=True)
    return {**section, "seed": config.seed, "out": str(Path(config.out) / stage)}


def _train(config: RunConfig, unlabelled: str, labelled: str) -> dict[str, Any]:
    """Pretrain and fine-tune; returns the models that the probe compares."""
    model = config.model.model_dump(mode="json")
    given = _given(config, "pretrain")
    if config.pretrain.monitor is not None:
        given["monitor"] = {"shards": labelled, **given.get("monitor", {})}
    adapted = pretrain({**given, "shards": unlabelled, "model": model})
    models = {"baseline": model, "adapted": {"weights": str(adapted.backbone)}}
    if config.finetune is not None:
        tuned = finetune({**_given(config, "finetune"), "train": labelled, "model": models["adapted"]})
        models["finetuned"] = {"weights": str(tuned.backbone), "head": str(tuned.folder / "head.safetensors")}
    return models


def _shards(folder: Path, data: DataConfig) -> dict[str, str]:
    """Shard folders by role; raw folders are packed, packed ones linked, so that the run holds them all."""
    for role, origin in data.folders().items():
        if (folder / role).exists():
            _refuse_changed(folder / role, role, origin, data.recipe)
        elif _packed(origin):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / role).unlink(missing_ok=True)  # a link whose target has moved
            (folder / role).symlink_to(Path(origin).resolve())
        else:
            pack(origin, folder / role, recipe=data.recipe)
    return {role: str(folder / role) for role in data.folders()}


def _refuse_changed(shards: Path, role: str, origin: str, recipe: str) -> None:
    """Shards are not packed anew: a folder that grew since would go unnoticed."""
    if shards.is_symlink() or not Path(origin).exists():
        return
    packed = ShardSet.open(shards)
    before, now = len(packed) + len(packed.skipped), sum(1 for _ in recipe_of(recipe)(origin)[1])
    if now != before:
        raise DataError(
            f"data.{role}: {origin} has changed since its images were packed: {now} images now, {before} then; "
            f"remove {shards} and the stages beside it that learnt from it, or choose another out"
        )


def _packed(origin: str) -> bool:
    return (Path(origin) / "manifest.json").is_file()
