"""Linear segmentation probe: what each patch token of a frozen backbone says about the pixels of its patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from explora.config import Config
from explora.errors import DataError
from explora.evaluation.inference import Inference
from explora.evaluation.linear import INIT_STD, order
from explora.evaluation.resampling import Resampled

if TYPE_CHECKING:
    from explora.data import Center, ShardSet
    from explora.models import ViT

IGNORE = 255
"""A pixel of this class number is neither learnt from nor scored."""
WEIGHT_DECAY = 1e-4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class PatchFeatures:
    """What a frozen backbone says about each patch of N images, and what their pixels show.

    `tokens` (N, h, w, D) float16: patch tokens of the last block after the final norm, row by row; `masks` (N, H, W)
    uint8: class numbers, 255 where nobody knows; `classes`: names. In memory N (2 h w D + H W) bytes: a ViT-B/16 at
    224 px takes 0.34 MB an image.
    """

    tokens: Tensor
    masks: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Tensor) -> PatchFeatures:
        """The images at `index` (M,) int64, in that order."""
        return replace(self, tokens=self.tokens[index], masks=self.masks[index])


class LinearSegmentation(Config):
    """A linear layer on standardised patch tokens; of a few learning rates the best mIoU on validation is tested.

    Source: Oquab et al. 2023 (DINOv2), linear segmentation: batch norm and a 1 x 1 convolution on the last block's
    patch tokens, logits upsampled bilinearly to the mask, cross-entropy, AdamW, a rate that falls linearly to 0. Here
    tokens are cached, so there are no random scales, crops and flips, and mean and standard deviation of all training
    tokens stand for the batch norm's running ones; there is no warm-up, and the rate is chosen, never on test images.
    Images are seen whole, not by sliding windows. The chosen head is not refit on train + val.
    """

    name: Literal["linear_segmentation"] = "linear_segmentation"
    """Picks this probe, and is what its results are called."""
    steps: int = Field(default=2000, ge=1)
    """Updates (DINOv2: 40,000)."""
    batch_size: int = Field(default=16, ge=1)
    """Images per update."""
    rates: tuple[PositiveFloat, ...] = Field(default=(1e-4, 1e-3, 1e-2), min_length=1)
    """Learning rates to choose from (DINOv2: 1e-3)."""
    seed: int = 0
    """Seed of the initial weights and of the order of images."""

    def evaluate(
        self, train: PatchFeatures, val: PatchFeatures, test: PatchFeatures, device: torch.device = CPU
    ) -> Iterator[Resampled]:
        """Fit on `train`, choose on `val`, score on `test`: mIoU, with what else torchgeo-bench names, in percent.

        Classes that neither masks nor predictions of the images scored hold are left out of means; a class that masks
        hold and training did not scores 0.

        Raises:
            DataError: a set is empty, has no labelled pixel, or its tokens, masks or classes do not fit the others'.
        """
        refuse_unusable(train, val, test)
        head = self.fit(train, device)
        found = [miou(tallies(head, number, val, self.batch_size)) for number in range(len(self.rates))]
        best = int(np.nanargmax(found))
        tested = tallies(head, best, test, self.batch_size)
        selected = {"lr": self.rates[best], "val_miou": 100 * found[best], "merge_val": False}
        ious = class_ious(tested)
        yield Resampled.drawn(
            *(self.name, "miou", partial(miou, tested), len(test), selected),
            others=pixel_scores(tested),
            per_class={name: v for name, v in zip(test.classes, ious.tolist(), strict=True) if not np.isnan(v)},
        )

    def fit(self, train: PatchFeatures, device: torch.device = CPU) -> Heads:
        """One head per learning rate, all from the same start and on the same batches."""
        mean, std = statistics(train.tokens)
        generator = torch.Generator().manual_seed(self.seed)
        start = INIT_STD * torch.randn(train.tokens.shape[-1], len(train.classes), generator=generator)
        weights = [start.to(device, copy=True).requires_grad_() for _ in self.rates]
        biases = [torch.zeros(len(train.classes), device=device, requires_grad=True) for _ in self.rates]
        heads = Heads(mean.to(device), std.to(device), weights, biases)
        groups = [{"params": pair, "lr": r} for *pair, r in zip(weights, biases, self.rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        for index in order(len(train), self.batch_size, self.steps, generator):
            tokens, masks = heads.standardised(train.tokens[index]), train.masks[index].to(device).long()
            known = (masks != IGNORE).sum().clamp(min=1)
            # head by head, because the logits of all at the size of the masks need not fit into memory
            for number in range(len(self.rates)):
                logits = heads.logits(number, tokens, tuple(masks.shape[1:]))
                (cross_entropy(logits, masks, ignore_index=IGNORE, reduction="sum") / known).backward()
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
        return heads


@dataclass(frozen=True)
class Heads:
    """Linear heads on tokens standardised by mean (D,) and std (D,): weights (D, C) and biases (C,) of each."""

    mean: Tensor
    std: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]

    def standardised(self, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, D) as the heads take them, float32, on their device."""
        return (tokens.to(self.mean.device).float() - self.mean) / self.std

    def logits(self, number: int, tokens: Tensor, size: tuple[int, ...]) -> Tensor:
        """Logits (B, C, H, W) of one head on standardised tokens (B, h, w, D), upsampled bilinearly to (H, W)."""
        coarse = (tokens @ self.weights[number] + self.biases[number]).permute(0, 3, 1, 2)
        return interpolate(coarse, size, mode="bilinear", align_corners=False)


def extract_patches(
    vit: ViT,
    shards: ShardSet,
    view: Center,
    inference: Inference,
    progress: Callable[[int], None] | None = None,
) -> PatchFeatures:
    """Patch tokens and masks of every image of `shards` in order; nothing is cached on disk.

    Memory is that of the result, see `PatchFeatures`, and of one batch: take a part of a large set with
    `shards.taking`. Tokens of several channel groups at one patch are averaged. The backbone is moved to the device and
    run in eval mode without gradients. `progress` is called with the number of images done so far.

    Raises:
        DataError: the shards have no masks or no images.
    """
    if shards.masks is None:
        raise DataError(f"{shards.folder}: has no masks to segment; pack it with the recipe segmentation")
    if len(shards) == 0:
        raise DataError(f"{shards.folder}: holds no images")
    side = view.size // vit.patch_size
    tokens = torch.empty(len(shards), side, side, vit.width, dtype=torch.float16)
    masks = torch.empty(len(shards), view.size, view.size, dtype=torch.uint8)
    training = vit.training
    vit.to(inference.device).eval()
    done = 0
    try:
        for found in _forward(vit, shards, view, inference):
            tokens[done : done + len(found)] = found.unflatten(1, (vit.groups, side, side)).mean(1)
            for number in range(done, done + len(found)):
                masks[number] = torch.from_numpy(view.mask(shards.mask(number)))
            done += len(found)
            if progress is not None:
                progress(done)
    finally:
        vit.train(training)
    assert done == len(shards), f"{done} of {len(shards)} images came through"
    return PatchFeatures(tokens, masks, shards.masks)


@torch.inference_mode()
def _forward(vit: ViT, shards: ShardSet, view: Center, inference: Inference) -> Iterator[Tensor]:
    """Patch tokens (B, groups h w, D) of each batch, fp32, on the CPU."""
    for batch in inference.batches(shards, view):
        with inference.autocast():
            patches = vit.features(batch["image"]).patches
        yield patches.float().cpu()


def statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and standard deviation (D,) over all patches of tokens (N, h, w, D), float32; no deviation is below
    the root of batch norm's 1e-5.
    """
    total = squares = torch.zeros(tokens.shape[-1], dtype=torch.float64)
    for image in tokens:
        rows = image.flatten(0, 1).double()
        total, squares = total + rows.sum(0), squares + rows.square().sum(0)
    count = tokens.shape[:-1].numel()
    mean = total / count
    return mean.float(), ((squares / count - mean.square()).clamp(min=0) + 1e-5).sqrt().float()


@torch.inference_mode()
def tallies(heads: Heads, number: int, features: PatchFeatures, batch_size: int) -> np.ndarray:
    """Pixels of each image and class that are right, true and predicted: float64 (N, 3, C), ignored ones left out."""
    found = []
    for tokens, masks in zip(features.tokens.split(batch_size), features.masks.split(batch_size), strict=True):
        logits = heads.logits(number, heads.standardised(tokens), tuple(masks.shape[1:]))
        found.append(tally(logits.argmax(1).cpu(), masks.long(), len(features.classes)))
    return torch.cat(found).numpy().astype(np.float64)


def tally(predicted: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Right, true and predicted pixels, int64 (B, 3, C), of each image: predicted (B, H, W), masks (B, H, W)."""
    image = torch.arange(len(masks))[:, None, None].expand_as(masks)
    known = masks != IGNORE
    right = known & (predicted == masks)
    counted = [(right, masks), (known, masks), (known, predicted)]
    places = [(image[kept] * classes + value[kept]).bincount(minlength=len(masks) * classes) for kept, value in counted]
    return torch.stack([place.view(-1, classes) for place in places], dim=1)


def miou(tallied: np.ndarray, counts: np.ndarray | None = None) -> float:
    """Mean intersection over union, in [0, 1], of tallies (N, 3, C) over the classes there are; NaN if there is none.

    Intersections and unions are those of all images together (Everingham et al. 2010), not means over images.

    Args:
        counts: how often each image stands in the set, (N,); None: once.
    """
    right, true, predicted = tallied.sum(axis=0) if counts is None else np.tensordot(counts, tallied, 1)
    there = true + predicted > 0
    return float((right[there] / (true + predicted - right)[there]).mean()) if there.any() else float("nan")


def class_ious(tallied: np.ndarray) -> np.ndarray:
    """Intersection over union (C,), in [0, 1], of each class; NaN for one that is neither true nor predicted."""
    right, true, predicted = tallied.sum(axis=0)
    return _share(right, true + predicted - right)


def pixel_scores(tallied: np.ndarray) -> dict[str, float]:
    """Further scores, in [0, 1], of tallies (N, 3, C), as torchgeo-bench names them.

    `pixel_accuracy`; `fw_iou`, IoU weighted by true pixels; `precision`, `recall` and `f1`, means over the classes
    that are true or predicted, with 0 for 0 / 0.
    """
    right, true, predicted = tallied.sum(axis=0)
    there = true + predicted > 0
    ratios = {"precision": (right, predicted), "recall": (right, true), "f1": (2 * right, true + predicted)}
    means = {name: float(np.nan_to_num(_share(*pair))[there].mean()) for name, pair in ratios.items()}
    weighted = float((true * np.nan_to_num(class_ious(tallied))).sum() / true.sum())
    return {"pixel_accuracy": float(right.sum() / true.sum()), "fw_iou": weighted, **means}


def refuse_unusable(train: PatchFeatures, *others: PatchFeatures) -> None:
    """Refuse what cannot be learnt from or scored.

    Raises:
        DataError: see `LinearSegmentation.evaluate`.
    """
    classes = len(train.classes)
    for features in (train, *others):
        if features.classes != train.classes:
            raise DataError("the training and test masks name different classes; pack both with the same classes.txt")
        if features.tokens.shape[-1] != train.tokens.shape[-1]:
            raise DataError("the training and test tokens differ in width; extract both with the same backbone")
        shown = (mask[mask != IGNORE] for mask in features.masks)
        largest = max((int(known.max()) for known in shown if len(known)), default=-1)
        if largest < 0:
            raise DataError("one of the training, validation and test sets has no labelled pixel; give more masks")
        if largest >= classes:
            raise DataError(f"a mask holds class {largest}, but only {classes} are named; name all in classes.txt")
        if not features.tokens.isfinite().all():
            raise DataError("the tokens hold NaN or infinity; check the weights, or extract them with precision fp32")


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
