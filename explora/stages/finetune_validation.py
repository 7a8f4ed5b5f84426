"""Which step of a fine-tuning to keep, and when to stop: the head is judged on images that teach nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from explora.config import Config
from explora.data import Center, ShardSet, batches, overlap
from explora.distributed import Precision, autocast, of_all, rank, size
from explora.engine.monitor import Watcher, evaluating
from explora.errors import DataError, TrainingError
from explora.evaluation import split
from explora.evaluation.base import accuracy
from explora.evaluation.calibration import fit_temperature
from explora.evaluation.groups import LEAST, members
from explora.evaluation.multilabel import micro_map
from explora.models import ViT
from explora.objectives import Supervised
from explora.objectives.supervised import classify
from explora.schedules import Length, LengthField
from explora.stages.sources import local_set

logger = logging.getLogger("explora")

_AT_ONCE = 64


class ValidationConfig(Config):
    """How fine-tuning is judged while it runs; test images never take part."""

    fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that are held out, of each class alike, drawn by the seed; equal files together."""
    shards: str | None = None
    """Labelled shards of the same classes to judge on; then all of `train` teaches."""
    every: LengthField = Length(1, "epochs")
    """How often, beside the start and the end: `100`, `"1 epochs"`, or a part of the run."""
    patience: int | None = Field(5, ge=1)
    """Evaluations in a row without a gain after which training stops; null goes on to the end."""
    metric: Literal["top1", "worst_group"] = "top1"
    """What counts: accuracy (micro-mAP where images have several labels), or that of the group where it is lowest."""

    @field_validator("every")
    @classmethod
    def _some(cls, every: Length) -> Length:
        if every.amount <= 0:
            raise ValueError("expected a length above 0; write `validation: null` to judge nothing")
        return every

    @model_validator(mode="after")
    def _one_source(self) -> ValidationConfig:
        if self.shards is not None and "fraction" in self.model_fields_set:
            raise ValueError("fraction and shards are both given; leave one of them out")
        return self


class ValidationImages(NamedTuple):
    """Images that judge."""

    images: ShardSet
    """A whole set."""
    rows: np.ndarray
    """Which images of it, by number."""


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    step: int
    """Steps taken before it."""
    value: float
    """The metric, percent."""
    loss: float
    """Mean cross-entropy without label smoothing, which decides between equal values."""

    def beats(self, other: Evaluation) -> bool:
        """Whether it is a gain over an earlier one."""
        return (self.value, -self.loss) > (other.value, -other.loss)


class Validation(Watcher):
    """Judges the head on held-out images, keeps the best, and ends a run that gains nothing more.

    The start is judged too: it is the best where training only does harm.

    Args:
        judges: labelled, of the head's classes; none of them teaches.
        on_best: called with `temperature` when an evaluation is the best so far.
        workers: processes that decode and crop.

    Raises:
        DataError: the metric needs groups that the images do not have.
    """

    _settings = "validation"

    def __init__(
        self,
        config: ValidationConfig,
        objective: Supervised,
        judges: ValidationImages,
        view: Center,
        on_best: Callable[[float | None], None],
        workers: int = 0,
    ) -> None:
        super().__init__(config.every, judges.images.taking(judges.rows), view)
        self.config, self.history = config, list[Evaluation]()
        self.temperature: float | None = None
        """That of the logits at the latest evaluation; None where none fits, or images have several labels."""
        self._keep = on_best
        self._objective, self._judges, self._workers = objective, judges, workers
        self._groups = _judged_groups(judges) if config.metric == "worst_group" else []

    @property
    def best(self) -> Evaluation:
        """The first of the best evaluations."""
        best = self.history[0]
        for one in self.history[1:]:
            best = one if one.beats(best) else best
        return best

    @property
    def ended(self) -> bool:
        """Whether the latest evaluations, as many as there is patience for, were no gain."""
        if self.config.patience is None or not self.history:
            return False
        return sum(one.step > self.best.step for one in self.history) >= self.config.patience

    def measure(self, vit: ViT, precision: Precision = "auto") -> dict[str, float]:
        """The score of the head on the validation images, percent, and its loss; each rank sees its part of them.

        Raises:
            DataError: an image cannot be read.
            TrainingError: the logits are not finite.
        """
        with evaluating(vit):
            logits, labels = self._classified(vit, precision)
        if not logits.isfinite().all():
            raise TrainingError(
                "the head's logits are NaN or infinite; lower optim.lr or set loop.precision to fp32, and start in "
                "another folder"
            )
        several = labels.ndim == 2
        self.temperature = None if several else fit_temperature(logits, labels)
        found = {"val_micro_map" if several else "val_top1": _score(logits, labels)}
        if self._groups:
            found["val_worst_group"] = min(_score(logits[rows], labels[rows]) for rows in self._groups)
        loss = (
            F.binary_cross_entropy_with_logits(logits, labels.double()) if several else F.cross_entropy(logits, labels)
        )
        return found | {"val_loss": float(loss)}

    def _judge(self, found: dict[str, float], step: int) -> dict[str, float]:
        *_, value, loss = found.values()  # of several scores the last one counts
        self.history.append(Evaluation(step, value, loss))
        if self.best is self.history[-1]:
            self._keep(self.temperature)
        if self.ended:
            logger.info(
                "step %d: no gain in %d evaluations; stopping, and keeping step %d with %.1f %%",
                *(step, self.config.patience, self.best.step, self.best.value),
            )
        return {}

    # Not inference_mode: what a model remembers from one pass to the next must still serve training.
    @torch.no_grad()
    def _classified(self, vit: ViT, precision: Precision) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) in float64 and labels of all validation images, in their order."""
        device, total = next(vit.parameters()).device, len(self._judges.rows)
        share = -(-total // size())
        # As many on each rank, because a sharded model needs all of them for every batch.
        mine = np.arange(rank() * share, (rank() + 1) * share).clip(max=total - 1)
        logits, labels = [], []
        part = self._judges.images.taking(self._judges.rows[mine])
        for raw in batches(part, self._view, _AT_ONCE, self._workers):
            images = self._view.finish({"image": raw["image"].to(device, non_blocking=True)})["image"]
            with autocast(device, precision):
                found = classify(vit([images])[0], self._objective.head, self._objective.config.pool)
            logits.append(found.cpu())
            labels.append(raw["label"])
        everyones = of_all((torch.cat(logits).numpy(), torch.cat(labels).numpy()))
        scores, truth = (torch.from_numpy(np.concatenate(parts)[:total]) for parts in zip(*everyones, strict=True))
        return scores.double(), truth

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": [asdict(one) for one in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.history = [Evaluation(**one) for one in state["history"]]

    def told(self, summary: dict[str, Any]) -> dict[str, Any]:
        """A run's summary, with the steps that it took of those it was to take, and what was judged."""
        best, last, planned = self.best, self.history[-1], summary["steps"]
        images = summary["images"] * last.step // planned
        judged = {
            "metric": self.config.metric,
            "images": len(self._judges.rows),
            "evaluations": len(self.history),
            "best_step": best.step,
            "best": best.value,
            "last": last.value,
            "stopped_early": last.step < planned,
            "seconds": round(self.seen.seconds, 2),
        }
        rate = round(images / summary["seconds"], 2)
        return summary | {"steps": last.step, "images": images, "images_per_second": rate, "validation": judged}


def divided(
    config: ValidationConfig | None, images: ShardSet, seed: int, scratch: str | None = None
) -> tuple[ShardSet, ValidationImages | None]:
    """The images that teach, and those that judge; with `fraction` of each class alike, and of each group within it
    where the lowest group counts. Sets with several labels per image are divided without regard to them. Images of the
    same bytes stay together, and count as the first of them.

    Raises:
        DataError: an image has no label, no class has two images, or the validation shards do not judge this task.
    """
    if config is None:
        return images, None
    if config.shards is not None:
        judging = local_set(config.shards, scratch)
        _refuse_unlike(images, judging)
        return images, ValidationImages(judging, np.arange(len(judging)))
    _, first, same = np.unique(images.index["digest"], return_index=True, return_inverse=True)
    different = np.sort(first)
    _, judge = split(_strata(config, images)[different], config.fraction, seed)
    if not len(judge):
        raise DataError(
            f"{images.folder}: no class has two different images, so none can be held out; give validation.shards"
        )
    held = np.isin(first[same], different[judge])
    return images.taking(np.flatnonzero(~held)), ValidationImages(images, np.flatnonzero(held))


def _strata(config: ValidationConfig, images: ShardSet) -> Tensor:
    """What the part that is held out has its share of: classes (n,), or classes and groups; or labels (n, C)."""
    if images.multilabel:
        return torch.from_numpy(images.targets)
    labels = torch.from_numpy(images.labels).long()
    if config.metric == "top1" or int(labels.min()) < 0:
        return labels
    groups = torch.from_numpy(images.groups).long() + 1
    return labels * (int(groups.max()) + 1) + groups


def _refuse_unlike(images: ShardSet, judging: ShardSet) -> None:
    """Refuse validation shards that do not judge what is taught, and say if they hold what teaches."""
    if judging.classes != images.classes or judging.multilabel != images.multilabel:
        raise DataError(
            f"validation.shards: {judging.folder} has other classes than {images.folder}; pack both from folders of "
            "the same names"
        )
    if not judging.multilabel and int(judging.labels.min()) < 0:
        raise DataError(f"validation.shards: {judging.folder} has images without a label; pack it by classes")
    if twice := len(overlap(judging, images)):
        logger.warning("validation.shards: %d of its %d images are in train, too", twice, len(judging))


def _score(logits: Tensor, labels: Tensor) -> float:
    """Percent: top-1 accuracy of logits (n, C) for labels (n,), or micro-mAP for labels (n, C)."""
    if labels.ndim == 2:
        return 100 * micro_map(logits.numpy(), labels.numpy())
    return accuracy(logits.argmax(-1), labels)


def _judged_groups(judges: ValidationImages) -> list[Tensor]:
    """Places among the judges of the images of each group that has enough of them.

    With several labels per image it needs one that shows a class, too, as average precision is not defined without.

    Raises:
        DataError: there are no groups, or none has what it needs.
    """
    told = judges.images.manifest.groups
    if told is None:
        raise DataError(
            f"validation.metric: the images in {judges.images.folder} are in no groups; pack them by --recipe table "
            "from a list with a column `group`, or take top1"
        )
    enough = list(members(judges.images.groups[judges.rows], told.names).values())
    needed = f"{LEAST} images"
    if judges.images.multilabel:
        targets = judges.images.targets[judges.rows]
        enough = [places for places in enough if targets[places].any()]
        needed += ", one of them with a class,"
    if not enough:
        raise DataError(
            f"validation.metric: no group in {judges.images.folder} has {needed} to judge on; raise "
            "validation.fraction, give validation.shards, or take top1"
        )
    return [torch.from_numpy(places) for places in enough]
