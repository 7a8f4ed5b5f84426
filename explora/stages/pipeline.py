"""`explora run`: the chain from raw images to the report."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from explora import config as configs
from explora.bands import RGB, Pixels
from explora.config import Config, Overrides
from explora.data import Center, ShardSet, whole_range
from explora.distributed import on_first, rank
from explora.errors import ConfigError, DataError, ExploraError, RunError
from explora.models import Loaded, ModelConfig, ViT
from explora.objectives import Objective, Supervised
from explora.reporting import (
    continual_table,
    is_comparison,
    leaderboard_table,
    side_table,
    table,
    write_continual,
    write_leaderboard,
    write_report,
    write_side,
)
from explora.runs import Run
from explora.stages.chain_data import DataConfig, RawSet, leaks, look, pack_all
from explora.stages.finetune import FinetuneSection, finetune
from explora.stages.finetune import build as build_finetune
from explora.stages.finetune_validation import Validation, divided
from explora.stages.fitting import RANGE, bands_of
from explora.stages.pretrain import PretrainSection, pretrain
from explora.stages.pretrain import build as build_pretrain
from explora.stages.probe import judge
from explora.stages.probe_config import ProbeSection, refuse_unfit
from explora.stages.section import TrainingSection, blueprint, rehearse
from explora.stages.training import logger, opened, together

Stage = Literal["pack", "pretrain", "finetune", "probe", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)


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

    On several ranks these train together; the first packs before and probes and reports after that. What was packed
    is held to `data`, and the whole chain to its config as soon as a stage has begun to train or to judge: until then
    a mistake that a stage meets can be corrected in the same folder.

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
        with _claimed(config):
            if "pack" in stages:
                on_first(lambda: _pack(config, out / "shards"))
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
                chain.finish({"stage": "run", "leaks": _leaks(config)})
                report(out)
    return out / "report.html"


@contextmanager
def _claimed(config: RunConfig) -> Iterator[None]:
    """The chain's folder; a mistake before any stage has begun leaves it to no config, though it holds shards."""
    out = Path(config.out)
    with opened(config):
        try:
            yield
        except ExploraError:
            if rank() == 0 and not any((out / stage / "config.yaml").exists() for stage in STAGES):
                (out / "config.yaml").unlink(missing_ok=True)
            raise


def _pack(config: RunConfig, shards: Path) -> None:
    """Pack what is not, between two looks at what could go wrong later."""
    rehearse_chain(config, shards)
    with Run.open(shards, config.data):
        pack_all(shards, config.data)
    if config.finetune is not None and config.finetune.validation is not None:
        rehearse_chain(config, shards)  # what is held out, and its groups, shows in packed images alone
    for leak in _leaks(config):
        logger.warning("%s", leak)


def _leaks(config: RunConfig) -> list[str]:
    validation = config.finetune.validation if config.finetune else None
    return leaks(Path(config.out) / "shards", validation.shards if validation else None)


def report(folder: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the HTML report of a chain, a continual run or a comparison, and log its table; returns the report's path.

    Several chains stand side by side on one page, `side_by_side.html` beside the first of them unless `out` says else;
    the table, a row per run, is also written beside the page as .md.

    Raises:
        RunError: a folder holds no run, or a damaged one, or a comparison among several.
    """
    to = None if out is None else Path(out)
    several = [folder] if isinstance(folder, str | Path) else list(folder)
    if len(several) > 1:
        if found := [str(one) for one in several if is_comparison(Path(one))]:
            raise RunError(f"{found[0]}: is a comparison, which has a page of its own; report it alone")
        path = write_side([Path(one) for one in several], to or Path(several[0]).parent / "side_by_side.html")
        logger.info("\n%s\n\nreport: %s", side_table(several), path)
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
    """Meet now the mistakes that the last stage would meet after hours; packed sets tell more than raw ones.

    Raises:
        ConfigError, DataError, WeightsError: what is wrong with the config, the sets or the weights.
    """
    source = blueprint(config.model)
    sets = {role: look(config.data, role, shards) for role in config.data.folders()}
    refuse_sets(config, sets, source.vit)
    if config.pretrain is not None:
        rehearse(config.pretrain, copy.deepcopy(source), build_pretrain)
    if config.finetune is not None:
        rehearse_finetune(config.finetune, source, sets["train"], config.seed)


def refuse_sets(config: RunConfig, sets: Mapping[str, ShardSet | RawSet], vit: ViT) -> None:
    """Refuse sets, by role, that the stages cannot learn from or be judged on; those that are not there are not missed.

    Raises:
        ConfigError, DataError: names the set or the key.
    """
    refuse_unfit(config.probe, sets, "data.")
    if "train" in sets:
        bands = bands_of(config.training.views, vit, sets["train"].pixels)
        _refuse_unlike({role: found.pixels for role, found in sets.items()}, bands)


def rehearse_finetune(
    section: FinetuneSection, source: Loaded, images: ShardSet | RawSet | None, seed: int
) -> Objective:
    """`rehearse`, and what the images say against fine-tuning on them; None where they are not there yet.

    Raises:
        ConfigError, DataError: names the key; what is held out, and its groups, is seen in packed images alone.
    """
    classes = (None if images is None else images.classes) or ("one", "other")
    several = images is not None and images.multilabel
    if several and section.head_start == "probe":
        raise ConfigError("head_start: a probe tells classes apart, but images have several labels; use random")
    if several and section.order.balance:
        raise ConfigError("order.balance: images with several labels cannot be balanced; set it to 0")
    objective = rehearse(section, source, partial(build_finetune, classes=len(classes), multilabel=several))
    if section.validation is not None and isinstance(images, ShardSet) and isinstance(objective, Supervised):
        _, judges = divided(section.validation, images, seed)
        if judges is not None:
            Validation(section.validation, objective, judges, Center(), on_best=lambda _: None)
    return objective


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
