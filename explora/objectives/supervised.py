"""Supervised fine-tuning: a linear head on the backbone's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.config import Config
from explora.errors import ConfigError
from explora.models import Tokens, ViT
from explora.models.vit import Mixup
from explora.objectives.base import Batch, Objective, StepOutput, shares
from explora.schedules import Progress


class SupervisedConfig(Config):
    """Settings of supervised fine-tuning; the defaults are those of the ExPLoRA paper's LoRA-r8 recipe."""

    name: Literal["supervised"] = "supervised"
    """Picks this objective."""
    pool: Literal["cls", "mean", "cls_mean"] = "mean"
    """Feature under the head: class token, mean of the patch tokens, or both side by side."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of each target that is spread evenly over all classes; with several labels over present and absent."""
    mixup: float = Field(0.0, ge=0)
    """Alpha of mixup; 0 is off, as it must be with several labels per image."""
    cutmix: float = Field(0.0, ge=0)
    """Alpha of CutMix; 0 is off, as it must be with several labels per image."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Share of images that skip a residual branch."""
    head_std: float = Field(2e-5, gt=0)
    """Standard deviation of the head's initial weights."""


class Supervised(Objective):
    """Cross-entropy on labels (B,), with label smoothing, mixup and CutMix as timm has them.

    Several labels per image (B, classes), 0 or 1, get binary cross-entropy, its mean over images and classes; label
    smoothing s makes 1 - s / 2 of a 1 and s / 2 of a 0, which is spreading it over a class's two outcomes.

    Args:
        extra: after each forward pass, by name, what the backbone adds to the loss of its images (scalars, their mean).
        multilabel: images have any number of labels each; a fact of the data, not a choice.

    Raises:
        ConfigError: mixup or CutMix of several labels per image.
    """

    inputs = frozenset({"image", "label"})
    _among: Tensor | None
    _places: Tensor | None

    def __init__(
        self,
        config: SupervisedConfig,
        backbone: ViT,
        classes: int,
        extra: Callable[[], dict[str, Tensor]] = dict,
        *,
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        if multilabel and (config.mixup > 0 or config.cutmix > 0):
            raise ConfigError(
                "objective.mixup: mixup and CutMix mix two images of one class each, but these images have several "
                "labels; set objective.mixup and objective.cutmix to 0"
            )
        self.config, self._extra, self.multilabel = config, extra, multilabel
        backbone.drop_path = config.drop_path
        width = backbone.width * (2 if config.pool == "cls_mean" else 1)
        self.student = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(width, classes)})
        nn.init.trunc_normal_(self.head.weight, std=config.head_std)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("_among", None, persistent=False)
        self.register_buffer("_places", None, persistent=False)
        self._mix = _mixing(config, classes)

    @property
    def backbone(self) -> ViT:
        return self.student["backbone"]  # type: ignore[return-value]

    @property
    def head(self) -> nn.Linear:
        return self.student["head"]  # type: ignore[return-value]

    @property
    def heads(self) -> list[nn.Module]:
        return [self.head]

    def decide_between(self, labels: Sequence[int]) -> None:
        """Leave all classes but these out: their rows of the head get gradients of exactly zero.

        No image may be of a class that is left out. Source: De Min et al. 2023 (arXiv 2308.09610), masked logits.
        """
        assert not self.multilabel, "classes of images with several labels do not exclude each other"
        self._among = torch.tensor(labels)
        self._places = torch.full((self.head.out_features,), -1)
        self._places[self._among] = torch.arange(len(labels))
        self._mix = _mixing(self.config, len(labels))

    def targets(self, micro_batches: Any, progress: Progress) -> list[float]:
        """Each micro-batch's share of the images of the step, over all ranks."""
        return shares([len(batch["label"]) for batch in micro_batches], micro_batches[0]["label"].device)

    def forward(self, batch: Batch, target: float, progress: Progress) -> StepOutput:
        own, scores = self._several(batch) if self.multilabel else self._one(batch)
        losses = {name: term * target for name, term in (own | self._extra()).items()}
        parts = {name: term.detach() for name, term in losses.items()}
        return StepOutput(
            torch.stack(list(losses.values())).sum(), parts | {name: term * target for name, term in scores.items()}
        )

    def _one(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and score, by name, of images with one label each."""
        images, labels = batch["image"], batch["label"]
        if self._places is not None:
            labels = self._places[labels]
        if self._mix is not None:
            images, soft = self._mix(images.clone(), labels)
            logits = self._logits(images)
            loss = -(soft * F.log_softmax(logits, -1)).sum(-1).mean()
        else:
            logits = self._logits(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return {"cross_entropy": loss}, {"train_accuracy": (logits.argmax(-1) == labels).float().mean()}

    def _several(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and score, by name, of images with any number of labels each."""
        logits = self._logits(batch["image"])
        labels = batch["label"].to(logits.dtype)
        smoothing = self.config.label_smoothing
        loss = F.binary_cross_entropy_with_logits(logits, labels * (1 - smoothing) + smoothing / 2)
        return {"binary_cross_entropy": loss}, {"train_samples_f1": samples_f1(logits > 0, labels > 0)}

    def _logits(self, images: Tensor) -> Tensor:
        logits = classify(self.backbone([images])[0], self.head, self.config.pool)
        return logits if self._among is None else logits[:, self._among]


def _mixing(config: SupervisedConfig, classes: int) -> Mixup | None:
    """What mixes the images of a batch and their labels, where the config wants that."""
    if config.mixup == config.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.label_smoothing,
        num_classes=classes,
    )


def classify(tokens: Tokens, head: nn.Linear, pool: str) -> Tensor:
    """Logits (B, classes) in fp32 of a linear head on pooled tokens."""
    features = {"cls": [tokens.cls_BD], "mean": [tokens.patches_BND.mean(1)]}
    features["cls_mean"] = features["cls"] + features["mean"]
    return head(torch.cat(features[pool], -1)).float()


def samples_f1(predicted: Tensor, labels: Tensor) -> Tensor:
    """Mean over images of the F1 of the classes predicted for each, bool (B, C) both; 1 where there are none at all.

    Unlike micro or macro F1 it is a mean over images, so those of micro-batches and ranks add up.
    """
    both = (predicted & labels).sum(-1)
    either = predicted.sum(-1) + labels.sum(-1)
    return torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0).mean()
