"""`explora finetune`: supervised fine-tuning of a backbone with labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from explora import config as configs
from explora.adapt import AnyMethod, LoRA, adapt
from explora.config import Overrides
from explora.data import Center, Crop
from explora.distributed import gathered, on_first
from explora.engine import checkpoint
from explora.errors import ConfigError, DataError
from explora.models import Loaded, load_model
from explora.models.export import save_tensors
from explora.objectives import Supervised, SupervisedConfig
from explora.stages.finetune_start import start_as_probe
from explora.stages.finetune_validation import Validation, ValidationConfig, divided
from explora.stages.fitting import expects
from explora.stages.result import Result
from explora.stages.section import TrainingPlace, TrainingSection, fitted, refuse_idle
from explora.stages.sources import local_set, refuse_strange_sets
from explora.stages.training import Trained, announce, logger, opened, seeded, together, train


class LabelSection(TrainingSection):
    """What every stage has that learns from labels."""

    adapt: AnyMethod = LoRA()
    """Which part of the backbone may change, and how."""
    objective: SupervisedConfig = SupervisedConfig()
    """The head and its loss."""
    views: Crop = Crop()
    """The crop made of an image; size, mean and std that are left out follow the backbone."""


class FinetuneSection(LabelSection):
    """What to learn from labels, and which part of the backbone may change."""

    head_start: Literal["random", "probe"] = "random"
    """How the head begins: near zero, or as logistic regression on the starting backbone's features (LP-FT)."""
    validation: ValidationConfig | None = None
    """Images that are held out to keep the best step and to stop early; null trains to the end on all."""


class FinetuneConfig(TrainingPlace, FinetuneSection):
    """Config of `explora finetune`."""

    train: str
    """Labelled shards that `explora pack` wrote."""


class Tuned:
    """What fine-tuning leaves: the backbone, the adapter, and head.safetensors (weight, bias; see `finetune`).

    With validation they are those of the best evaluation, written when it was made; otherwise those of the end.
    """

    def __init__(self, config: FinetuneSection, objective: Supervised, classes: list[str]) -> None:
        self._result, self._objective, self._classes = Result(objective, config.adapt), objective, classes
        self._keeps_best = config.validation is not None

    def save(self, folder: Path) -> None:
        """Write what is to be left at the end; every rank must ask, the first writes.

        Raises:
            TrainingError: weights are NaN or infinite; nothing is left.
        """
        if not self._keeps_best:
            self.write(folder)

    def write(self, folder: Path, temperature: float | None = None) -> None:
        """Write what is there now, with the head's temperature where images that do not teach chose one."""
        self._result.save(folder)
        head = gathered(self._objective.head.state_dict())
        facts = {"pool": self._objective.config.pool, "classes": self._classes, "temperature": temperature}
        on_first(lambda: save_tensors(folder / "head.safetensors", head, facts))


def finetune(source: str | Path | Mapping[str, Any], overrides: Overrides = None) -> Trained:
    """Fine-tune from a config file or mapping; goes on from the newest checkpoint of an unfinished run.

    Beside the backbone it writes head.safetensors (weight, bias; metadata: pool, classes, temperature). Validation
    images choose the temperature (Guo et al. 2017); without any it is null, as those that teach would make it too low.

    Raises:
        ExploraError: any mistake in the config, the data, the weights or the run folder.
    """
    config = configs.load(FinetuneConfig, source, overrides)
    with together(config.loop):
        return _finetune(config)


def _finetune(config: FinetuneConfig) -> Trained:
    seeded(config.seed)
    labelled = local_set(config.train, config.scratch)
    if labelled.classes is None:
        raise DataError(f"{config.train}: has no labels; fine-tuning needs one folder per class before packing")
    loaded = load_model(config.model)
    config = fitted(config, loaded.vit, labelled.pixels)
    refuse_strange_sets(labelled, config.views)
    images, judges = divided(config.validation, labelled, config.seed, config.scratch)
    objective = build(config, loaded, len(labelled.classes), labelled.multilabel)
    refuse_idle(config, objective, len(images))
    with opened(config) as run:
        done = on_first(lambda: run.summary)
        if done is not None:
            logger.info("%s: already finished", config.out)
            return Trained.of(run, done)
        announce(loaded.vit, loaded.account)
        tuned, view = Tuned(config, objective, labelled.classes), _centre(config.views)
        if config.head_start == "probe" and checkpoint.newest(run.folder / "checkpoints") is None:
            on_first(lambda: start_as_probe(config, objective, images, view, run.folder / "features", config.seed))
        watch = None
        if config.validation is not None and judges is not None:
            refuse_strange_sets(judges.images, view)
            watch = Validation(
                config.validation, objective, judges, view, partial(tuned.write, run.folder), config.workers
            )
        summary = train(run, config, config.seed, objective, tuned, images, "finetune", watch)
        return Trained.of(run, run.finish(summary if watch is None else watch.told(summary)))


def _centre(views: Crop) -> Center:
    """What the head is judged on, and begins from: the middle of an image, as `views` scale and normalise it."""
    given = views.model_dump(include=set(Center.model_fields) - {"name"})
    return configs.validate(Center, given, "views")


def build(section: LabelSection, source: Loaded, classes: int, multilabel: bool = False) -> Supervised:
    """Adapt the backbone and put a fresh head on it.

    Raises:
        ConfigError: the micro-batch, the pooled feature or the labels do not fit the method or the objective.
    """
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
    objective = Supervised(section.objective, vit, classes, multilabel=multilabel)
    objective.method = section.adapt
    return objective
