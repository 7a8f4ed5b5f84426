"""What `explora probe` is told: which models, on which sets, judged by what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pydantic import Field, field_validator, model_validator

from explora.config import Config
from explora.data import Center
from explora.distributed import Precision, device_of
from explora.errors import DataError
from explora.evaluation import KNN, AnyEvaluator, Inference, Linear, LinearCrops, LogisticRegression
from explora.evaluation.segmentation import LinearSegmentation
from explora.models import ModelConfig


class ProbedModel(ModelConfig):
    """A backbone to judge, with its own classification head where it has one."""

    head: str | None = None
    """head.safetensors of a fine-tuning; adds the evaluator `head`."""
    view: Center | None = None
    """Crop for this model alone; null takes that of all."""


class ProbeSection(Config):
    """How to judge."""

    view: Center | None = None
    """Crop of the images; size, range, mean and std that are left out follow each backbone."""
    evaluators: tuple[AnyEvaluator, ...] = (Linear(), LogisticRegression(), KNN(k=(10, 20)))
    """What judges the target; the first is the one that the report's headline takes."""
    source_evaluators: tuple[AnyEvaluator, ...] = (LogisticRegression(), KNN(k=(10, 20)))
    """What judges the source domain."""
    control_evaluators: tuple[AnyEvaluator, ...] = (KNN(k=(5,), leave_one_out=True, held_out=True),)
    """What judges the control set, within itself."""
    linear_crops: LinearCrops | None = None
    """DINOv2's linear protocol with random crops beside the evaluators: each step is a pass of the backbone."""
    segmentation: LinearSegmentation = LinearSegmentation()
    """The probe of patch tokens, where there are masks."""
    val_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the training images on which settings are chosen; the test images never choose anything."""
    blocks: int = Field(4, ge=1)
    """Last blocks whose class tokens are kept."""
    pictures: int = Field(6, ge=0)
    """Test images shown with patch features and attention, beside a map of all of them; 0 leaves both out."""
    batch_size: int = Field(64, ge=1)
    """Images in one forward pass."""
    workers: int = Field(0, ge=0)
    """Processes that decode and crop; 0 does it in the main one."""
    precision: Precision = "fp32"
    """Format of the backbone's matrix products; small differences count here, so fp32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; `auto` takes a GPU when there is one."""
    cache: str | None = None
    """Folder for features; null keeps them in the run folder. Share it between runs to extract a baseline once."""

    @field_validator("control_evaluators")
    @classmethod
    def _within_one_set(cls, evaluators: tuple[AnyEvaluator, ...]) -> tuple[AnyEvaluator, ...]:
        learning = [evaluator.label for evaluator in evaluators if not evaluator.within_test]
        if learning:
            raise ValueError(f"{', '.join(learning)}: the control is one set, judged within itself; set held_out: true")
        return evaluators

    @field_validator("evaluators", "source_evaluators", "control_evaluators")
    @classmethod
    def _told_apart(cls, evaluators: tuple[AnyEvaluator, ...]) -> tuple[AnyEvaluator, ...]:
        labels = [evaluator.label for evaluator in evaluators]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} more than once: their results could not be told apart; keep one")
        return evaluators

    def inference(self) -> Inference:
        """How images go through each backbone."""
        return Inference(self.batch_size, self.workers, device_of(self.device), self.precision)

    def judges(self) -> dict[str, tuple[str, str, tuple[AnyEvaluator, ...]]]:
        """By data: the set to learn from, the set to judge on, and what judges."""
        return {
            "target": ("train", "test", self.evaluators),
            "source": ("source_train", "source_test", self.source_evaluators),
            "control": ("control", "control", self.control_evaluators),
        }

    def needed(self) -> set[str]:
        """The sets whose features are looked at; nobody needs training images if all judge within the test images."""
        judges = self.judges().values()
        learning = {train for train, _, them in judges if not all(evaluator.within_test for evaluator in them)}
        crops = {"train"} if self.linear_crops else set()
        return {test for _, test, _ in judges} | learning | crops


class DataSets(Config):
    """The sets that models are judged on, by their roles: folders of shards, or, in a chain, of images."""

    train: str
    """Labelled target images to fit probes on; a chain fine-tunes on them, too."""
    test: str
    """Labelled target images that only judge."""
    source_train: str | None = None
    """Labelled source-domain images to fit probes on: with these two the table says what was forgotten."""
    source_test: str | None = None
    """Labelled source-domain images that only judge."""
    control: str | None = None
    """Labelled images of neither domain: what rises here as well is no adaptation to the target."""
    masks_train: str | None = None
    """Target images with masks to fit the segmentation probe on."""
    masks_test: str | None = None
    """Target images with masks that only judge."""

    @model_validator(mode="after")
    def _whole_pairs(self) -> DataSets:
        for what, one, other in (
            ("the source domain", "source_train", "source_test"),
            ("segmentation", "masks_train", "masks_test"),
        ):
            absent = [name for name in (one, other) if getattr(self, name) is None]
            if len(absent) == 1:
                given = other if absent == [one] else one
                raise ValueError(f"{given} is given, but not {absent[0]}; {what} needs both, or neither")
        return self


SETS = tuple(DataSets.model_fields)
"""The roles of sets."""
JUDGES = {"target": "test", "source": "source_test", "control": "control", "segmentation": "masks_test"}
"""The sets that judge, by what rows call them."""


class ProbePlace(DataSets):
    """Where the probe reads and writes."""

    out: str
    """Run folder; features that are there already are not extracted again."""
    seed: int = Field(0, ge=0)
    """Draws the validation images, and the weights of a model without any."""
    models: dict[str, ProbedModel] = Field(min_length=1)
    """Backbones by the name they get in the table; the first is what the others are compared with."""


class ProbeConfig(ProbePlace, ProbeSection):
    """Config of `explora probe`."""


class Labelled(Protocol):
    """What a set says of its labels and masks: a `ShardSet` does, and so do images that are not packed yet."""

    @property
    def folder(self) -> Path: ...

    @property
    def classes(self) -> list[str] | None: ...

    @property
    def masks(self) -> list[str] | None: ...

    @property
    def multilabel(self) -> bool: ...


def refuse_unfit(section: ProbeSection, sets: Mapping[str, Labelled], where: str = "") -> None:
    """Refuse sets, by role, that cannot be judged as the section says, before anything is extracted.

    Args:
        where: what stands before a role in the config.

    Raises:
        DataError: a set has no labels or no masks, or the evaluators are for labels of another kind.
    """
    for role in SETS:
        if role not in sets:
            continue
        found = sets[role]
        if role.startswith("masks_"):
            if found.masks is None:
                raise DataError(f"{where}{role}: {found.folder} has no masks; pack it with --recipe segmentation")
        elif found.classes is None:
            raise DataError(f"{where}{role}: {found.folder} has no labels; the probe needs one folder per class")
    for data, (_, test, evaluators) in section.judges().items():
        if test not in sets:
            continue
        multilabel = sets[test].multilabel
        unfit = [one.label for one in evaluators if one.multilabel != multilabel]
        if unfit or (multilabel and data == "target" and section.linear_crops):
            kinds = ("one label", "linear, knn"), ("several labels", "logreg_multi, knn_multi")
            kind, fitting = kinds[multilabel]
            raise DataError(
                f"{where}{test}: the images of {sets[test].folder} have {kind} each, which "
                f"{', '.join(unfit) or 'linear_crops'} cannot judge by; use evaluators such as {fitting}"
            )
