"""`explora run`: the chain from raw images to the report."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from explora import config as configs
from explora.bands import RGB, Pixels
from explora.config import Config, Overrides
from explora.data import Center, ShardSet, overlap, whole_range
from explora.distributed import on_first, rank
from explora.errors import ConfigError, DataError, RunError
from explora.models import ModelConfig
from explora.reporting import (
    continual_table,
    is_comparison,
    leaderboard_table,
    table,
    write_continual,
    write_leaderboard,
    write_report,
    write_side,
)
from explora.stages.finetune import FinetuneSection, finetune
from explora.stages.finetune import build as build_finetune
from explora.stages.fitting import RANGE, bands_of
from explora.stages.pack import pack, recipe_of
from explora.stages.pretrain import PretrainSection, pretrain
from explora.stages.pretrain import build as build_pretrain
from explora.stages.probe import judge
from explora.stages.probe_config import ProbeSection, check_pairs
from explora.stages.section import TrainingSection, blueprint, rehearse
from explora.stages.training import logger, opened, together

Stage = Literal["pack", "pretrain", "finetune", "probe", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)


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
    control: str | None = None
    """Labelled images of neither domain: what rises here as well is no adaptation to the target."""
    masks_train: str | None = None
    """Target images with masks to fit the segmentation probe on, as the recipe `segmentation` finds them."""
    masks_test: str | None = None
    """Target images with masks that only judge."""
    recipe: str = "folder"
    """How the folders are laid out."""
    pixels: Pixels | None = None
    """What the values of raw images mean, where the recipe does not know: bands, dtype, unit, scale, offset."""

    @model_validator(mode="after")
    def _whole_pairs(self) -> DataConfig:
        check_pairs(self)
        return self

    def folders(self) -> dict[str, str]:
        """What is given, by role."""
        return {role: folder for role, folder in self if role not in ("recipe", "pixels") and folder is not None}

    def recipe_for(self, role: str) -> str:
        """How the folder of a role is laid out."""
        return "segmentation" if role.startswith("masks_") else self.recipe


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
    pretrain: PretrainSection | None = PretrainSection()
    """How to pretrain, with the settings of `explora pretrain`; null leaves it out."""
    finetune: FinetuneSection | None = FinetuneSection()
    """How to fine-tune, with the settings of `explora finetune`; null leaves it out."""
    probe: ProbeSection = ProbeSection()
    """How to judge, with the settings of `explora probe`."""

    @model_validator(mode="after")
    def _trains(self) -> RunConfig:
        if self.pretrain is None and self.finetune is None:
            raise ValueError("pretrain and finetune are both null, so nothing would be trained; use explora probe")
        return self

    @property
    def training(self) -> TrainingSection:
        """The first of its training stages."""
        first = self.pretrain or self.finetune
        assert first is not None
        return first


def run(source: str | Path | Mapping[str, Any], overrides: Overrides = None, stage: Stage | None = None) -> Path:
    """Pack, pretrain, fine-tune, probe and report; finished training is not repeated, features come from the cache.

    On several ranks these train together; the first packs before and probes and reports after that.

    Args:
        stage: the only one to run; those before it must have finished.

    Returns:
        The report's path.

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folders.
    """
    config = configs.load(RunConfig, source, overrides)
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"stage: expected one of {', '.join(STAGES)}, got '{stage}'")
    stages: tuple[str, ...] = STAGES if stage is None else (stage,)
    out = Path(config.out)
    with together(config.training.loop):
        alone = rank() == 0
        with opened(config):
            if "pack" in stages:
                on_first(lambda: rehearse_chain(config, out / "shards"))
                on_first(lambda: pack_all(out / "shards", config.data))
                on_first(lambda: _warn_of_leaks(out / "shards"))
            else:
                on_first(lambda: _refuse_early(config, stages[0]))
            if "pretrain" in stages and config.pretrain is not None:
                pretrain(_pretraining(config))
            if "finetune" in stages and config.finetune is not None:
                finetune(_finetuning(config))
    if alone and not {"probe", "report"}.isdisjoint(stages):
        with opened(config) as chain:
            if "probe" in stages:
                judge({**_given(config, "probe"), "models": _alike(config), **_judged(config)})
            if "report" in stages:
                chain.finish({"stage": "run", "leaks": _leaks(out / "shards")})
                report(out)
    return out / "report.html"


def report(folder: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the HTML report of a chain, a continual run or a comparison, and log its table; returns the report's path.

    Several chains stand side by side on one page, `side_by_side.html` beside the first of them unless `out` says else.

    Raises:
        RunError: the folder holds no run, or a damaged one.
    """
    to = None if out is None else Path(out)
    several = [folder] if isinstance(folder, str | Path) else list(folder)
    if len(several) > 1:
        path = write_side([Path(one) for one in several], to or Path(several[0]).parent / "side_by_side.html")
        logger.info("report: %s", path)
        return path
    folder = Path(several[0])
    if is_comparison(folder):
        path, text = write_leaderboard(folder, to), leaderboard_table(folder)
    elif (folder / "results.json").is_file():
        path, text = write_continual(folder, to), continual_table(folder)
    else:
        path, text = write_report(folder, to), table(folder)
    logger.info("\n%s\n\nreport: %s", text, path)
    return path


def rehearse_chain(config: RunConfig, shards: Path) -> None:
    """Meet now the mistakes that the last stage would meet after hours."""
    counts, meant = {}, {}
    source = blueprint(config.model)
    for role, origin in config.data.folders().items():
        if (shards / role).exists():
            origin = str(shards / role)
        packed = ShardSet.open(origin) if _packed(origin) else None
        found = packed or recipe_of(config.data.recipe_for(role))(Path(origin), None)
        if role.startswith("masks_"):
            if found.masks is None:
                raise DataError(f"data.{role}: {origin} has no masks; pack it with --recipe segmentation")
        elif found.classes is None and role != "pretrain":
            raise DataError(f"data.{role}: {origin} has no labels; the probe needs one folder per class")
        counts[role] = len(found.classes or ())
        meant[role] = found.pixels if packed or config.data.pixels is None else config.data.pixels
        if packed and config.data.pixels is not None and _meaning(packed.pixels) != _meaning(config.data.pixels):
            raise ConfigError(
                f"data.pixels: {origin} is packed already, and its values mean something else; leave data.pixels out, "
                "or give the images that were packed"
            )
    _refuse_unlike(meant, bands_of(config.training.views, source.vit, meant["train"]))
    if config.pretrain is not None:
        rehearse(config.pretrain, copy.deepcopy(source), build_pretrain)
    if config.finetune is not None:
        rehearse(config.finetune, source, partial(build_finetune, classes=counts["train"]))


def _refuse_unlike(meant: Mapping[str, Pixels], bands: tuple[str, ...]) -> None:
    """Refuse sets that one backbone cannot be fed from: all need its bands, and one unit."""
    for role, pixels in meant.items():
        advice = "set model.bands to what all sets have"
        if role.startswith("source_"):
            advice = "retention needs source images of the same bands and unit; give such, or leave source_* out"
        absent = [band for band in bands if band not in pixels.names]
        if absent:
            raise DataError(
                f"data.{role}: has the bands {', '.join(pixels.names)}, but the model takes {', '.join(absent)} too; "
                f"{advice}"
            )
        if pixels.unit != meant["train"].unit:
            unit = advice if role.startswith("source_") else "pack one of them with the scale and offset of the other"
            raise DataError(
                f"data.{role}: holds values in {pixels.unit}, but data.train in {meant['train'].unit}; {unit}"
            )


def _meaning(pixels: Pixels) -> dict[str, Any]:
    """What stored values are, without what was measured of them."""
    return {**pixels.model_dump(exclude={"bands"}), "names": pixels.names}


def _refuse_early(config: RunConfig, stage: str) -> None:
    """Refuse a stage alone while one before it has not finished."""
    done = {name: (Path(config.out) / name / "summary.json").exists() for name in STAGES}
    done["pack"] = all(Path(folder).exists() for folder in _shards(config).values())
    done["pretrain"] |= config.pretrain is None
    done["finetune"] |= config.finetune is None
    for name in STAGES[: STAGES.index(stage)]:
        if not done[name]:
            raise RunError(
                f"{config.out}: stage '{stage}' needs what '{name}' leaves, which has not finished; run that first"
            )


def _given(config: RunConfig, stage: str) -> dict[str, Any]:
    """What the user wrote for a stage, with its seed and its folder."""
    section = getattr(config, stage).model_dump(mode="json", exclude_unset=True)
    return {**section, "seed": config.seed, "out": str(Path(config.out) / stage)}


def _pretraining(config: RunConfig) -> dict[str, Any]:
    """The config of the pretraining stage alone."""
    shards = _shards(config)
    given = _given(config, "pretrain")
    if config.pretrain is not None and config.pretrain.monitor is not None:
        given["monitor"] = {"shards": shards["train"], **given.get("monitor", {})}
    return {**given, "shards": shards.get("pretrain", shards["train"]), "model": _models(config)["baseline"]}


def _finetuning(config: RunConfig) -> dict[str, Any]:
    """The config of the fine-tuning stage alone."""
    models = _models(config)
    start = models.get("adapted", models["baseline"])
    return {**_given(config, "finetune"), "train": _shards(config)["train"], "model": start}


def _judged(config: RunConfig) -> dict[str, str]:
    """The shards that the probe sees."""
    return {role: folder for role, folder in _shards(config).items() if role != "pretrain"}


def _models(config: RunConfig) -> dict[str, Any]:
    """The models that the probe compares, where the stages leave them."""
    out = Path(config.out)
    models: dict[str, Any] = {"baseline": config.model.model_dump(mode="json")}
    if config.pretrain is not None:
        models["adapted"] = {"weights": str(out / "pretrain" / "backbone.safetensors")}
    if config.finetune is not None:
        tuned = out / "finetune"
        models["finetuned"] = {
            "weights": str(tuned / "backbone.safetensors"),
            "head": str(tuned / "head.safetensors"),
        }
    return models


def _alike(config: RunConfig) -> dict[str, Any]:
    """The models to probe; the baseline sees the range that was trained in, which it has no record of itself."""
    models, given = _models(config), config.probe.view or Center()
    first = "finetune" if config.pretrain is None else "pretrain"
    views = configs.parse(Path(config.out) / first / "config.yaml")["views"]
    photographs = whole_range(RGB).model_dump(mode="json"), list(RGB)
    if given.scaling is None and (views["scaling"], views["bands"]) != photographs:
        same = {key: views[key] for key in RANGE}
        models["baseline"]["view"] = {**same, **given.model_dump(mode="json", exclude_unset=True)}
    return models


def _shards(config: RunConfig) -> dict[str, str]:
    """Shard folders by role, where packing leaves them."""
    return {role: str(Path(config.out) / "shards" / role) for role in config.data.folders()}


def pack_all(folder: Path, data: DataConfig) -> None:
    """Pack raw folders, link packed ones, so that a run holds them all by their roles."""
    pixels = None if data.pixels is None else data.pixels.model_dump(mode="json")
    for role, origin in data.folders().items():
        if (folder / role).exists():
            _refuse_changed(folder / role, role, origin, data.recipe_for(role))
        elif _packed(origin):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / role).unlink(missing_ok=True)  # a link whose target has moved
            (folder / role).symlink_to(Path(origin).resolve())
        else:
            pack(origin, folder / role, recipe=data.recipe_for(role), pixels=pixels)


def _leaks(folder: Path) -> list[str]:
    """What judges although it has taught, a sentence for each pair of sets."""
    found = []
    for taught, judges in (("train", "test"), ("pretrain", "test"), ("source_train", "source_test")):
        if (folder / taught).exists() and (folder / judges).exists():
            a, b = ShardSet.open(folder / taught), ShardSet.open(folder / judges)
            if leaked := len(overlap(b, a)):
                found.append(f"data.{judges}: {leaked} of its {len(b)} images are in data.{taught}, too")
    return found


def _warn_of_leaks(folder: Path) -> None:
    for leak in _leaks(folder):
        logger.warning("%s", leak)


def _refuse_changed(shards: Path, role: str, origin: str, recipe: str) -> None:
    """Shards are not packed anew: a folder that grew since would go unnoticed."""
    if shards.is_symlink() or not Path(origin).exists():
        return
    packed = ShardSet.open(shards)
    before, now = len(packed) + packed.manifest.left_out, sum(1 for _ in recipe_of(recipe)(Path(origin), None).samples)
    if now != before:
        raise DataError(
            f"data.{role}: {origin} has changed since its images were packed: {now} images now, {before} then; "
            f"remove {shards} and the stages beside it that learnt from it, or choose another out"
        )


def _packed(origin: str) -> bool:
    return (Path(origin) / "manifest.json").is_file()
