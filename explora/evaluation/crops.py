"""DINOv2's linear probe with random crops: the heads of `linear`, taught by crops that are new at every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from explora.errors import DataError
from explora.evaluation.base import Result, encode, known_classes
from explora.evaluation.calibration import calibration
from explora.evaluation.features import Features
from explora.evaluation.linear import Grid, choose


class LinearCrops(Grid):
    """Settings of `fit_crops`; declared apart from `linear`, whose training images are cached centre crops."""

    @property
    def label(self) -> str:
        """What its results are called; they are never compared with those of `linear`."""
        return "linear_crops"


def fit_crops(settings: LinearCrops, batches: Iterable[Features], val: Features, test: Features) -> Result:
    """Train the whole grid of heads on fresh random crops; choose one on `val`, score it on `test`, without a refit.

    `batches` yields one `Features` a step: random crops of that step's training images through the frozen backbone.
    `val` and `test` are features of centre crops. The head that is scored is the one that was chosen, as in DINOv2,
    but chosen on validation images: it has not learnt from `val`, so it has seen fewer images than the refit of
    `linear`. The temperature of its calibration comes from its logits of `val`.

    Source: Oquab et al. 2023 (DINOv2), linear evaluation.

    Raises:
        DataError: labels are missing or do not match, or features are not finite.
        ValueError: there are more or fewer batches than `settings.steps`.
    """
    known = known_classes(val.join(test), val, test)
    if val.classes is not None:  # training images may be of classes that neither of the two holds
        known = torch.arange(len(val.classes))
    y_val, y_test = encode(known, val.labels), encode(known, test.labels)
    inputs = settings.inputs(val.cls.shape[1])
    stream = _rows(batches, known, max(blocks for blocks, _ in inputs), val.classes)
    fits = settings.fit(stream, inputs, settings.rates, val.mean.shape[1], len(known))
    chosen = choose(fits, inputs, settings.rates, val, y_val)
    logits = torch.addmm(chosen.bias, test.matrix(*chosen.input), chosen.weight.T)
    predictions = known[logits.argmax(1)]
    return Result.over(
        settings.label,
        (predictions == test.labels).numpy(),
        chosen.selected("random crops"),
        predictions.numpy(),
        calibration=calibration(chosen.logits, y_val, logits, y_test),
    )


def _rows(
    batches: Iterable[Features], known: Tensor, deepest: int, classes: list[str] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What heads learn from each batch, after refusing what they cannot: inputs (B, D) and places of classes (B,)."""
    for batch in batches:
        x = batch.matrix(deepest, avgpool=True)
        if batch.classes != classes or not torch.isin(batch.labels, known).all():
            raise DataError(
                "the training images have no labels, or others than the validation images; "
                "pack both from the same folders"
            )
        if not x.isfinite().all():
            raise DataError("the features hold NaN or infinity; check the weights, or extract them with precision fp32")
        yield x, encode(known, batch.labels)
