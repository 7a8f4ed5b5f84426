"""Frozen-backbone features: extracted once, cached by what they depend on, split and drawn from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from explora.distributed import precision_on
from explora.errors import ConfigError, DataError, RunError
from explora.evaluation.inference import Inference

if TYPE_CHECKING:
    from explora.data import ShardSet, Views
    from explora.models import ViT

_FORMAT = "explora-features-1"


@dataclass(frozen=True)
class Features:
    """What a frozen backbone says about N images.

    `cls` (N, n, D) float32: class tokens of the last n blocks after the final norm, the last block last;
    `mean` (N, D) float32: mean patch token of the last block; `labels` (N,) int64, -1 without a label, or of images
    with several labels each (N, C) uint8, 1 where a class is present; `classes`: class names, if known;
    `fingerprint`: which images these are, in which order.
    """

    cls: Tensor
    mean: Tensor
    labels: Tensor
    classes: list[str] | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.labels.ndim == 2

    def matrix(self, blocks: int = 1, avgpool: bool = False) -> Tensor:
        """Input of a linear head, (N, (blocks [+ 1]) * D): class tokens of the last blocks, then the mean.

        Source: Oquab et al. 2023 (DINOv2), linear evaluation.

        Raises:
            DataError: fewer blocks were extracted than asked for.
        """
        available = self.cls.shape[1]
        if not 1 <= blocks <= available:
            raise DataError(f"asked for {blocks} blocks, but these features hold {available}; set blocks to fit")
        tokens = self.cls[:, -blocks:].flatten(1)
        return torch.cat([tokens, self.mean], dim=1) if avgpool else tokens

    def take(self, index: Tensor) -> Features:
        """The images at `index` (M,) int64, in that order."""
        fingerprint = _digest(self.fingerprint.encode(), index.numpy())
        return replace(
            self,
            cls=self.cls[index],
            mean=self.mean[index],
            labels=self.labels[index],
            fingerprint=fingerprint,
        )

    def join(self, other: Features) -> Features:
        """These images, then the other's.

        Raises:
            DataError: the two have different classes, or only one of them has several labels per image.
        """
        if self.classes != other.classes:
            raise DataError("cannot join two sets of features whose class names differ")
        if self.labels.shape[1:] != other.labels.shape[1:]:
            raise DataError("cannot join images with one label each and images with several; pack both the same way")
        return Features(
            cls=torch.cat([self.cls, other.cls]),
            mean=torch.cat([self.mean, other.mean]),
            labels=torch.cat([self.labels, other.labels]),
            classes=self.classes,
            fingerprint=_digest(self.fingerprint.encode(), other.fingerprint.encode()),
        )


def extract(
    vit: ViT,
    shards: ShardSet,
    view: Views,
    inference: Inference,
    *,
    blocks: int,
    cache_dir: str | Path,
    weights_hash: str,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of every image of `shards` in order, from the cache if they have been computed before.

    The backbone is moved to the device and run in eval mode without gradients. A backbone with fewer than
    `blocks` blocks gives all it has. A damaged cache file is computed again and replaced. `progress` is
    called with the number of images done so far.

    Raises:
        RunError: the cache cannot be written.
    """
    blocks = min(blocks, vit.depth)
    # two architectures may hold equal tensors: options such as the number of heads leave no trace in them
    architecture = [vit.name, vit.options, vit.image_size, weights_hash]
    recipe = [architecture, shards.fingerprint, view.model_dump(mode="json"), blocks]
    path = Path(cache_dir) / _cache_name(*recipe, precision_on(inference.device, inference.precision))
    cached = _load(path, shards.fingerprint, shards.classes)
    if cached is not None:
        return cached
    _make(path.parent)
    training = vit.training
    vit.to(inference.device).eval()
    parts, done = [], 0
    try:
        for part in _forward(vit, shards, view, inference, blocks):
            parts.append(part)
            done += len(part[-1])
            if progress is not None:
                progress(done)
    finally:
        vit.train(training)
    assert done == len(shards) > 0, f"{done} of {len(shards)} images came through"
    cls, mean, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    features = Features(cls, mean, labels, shards.classes, shards.fingerprint)
    _save(path, features)
    return features


def split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split of images by their labels: sorted indices to train on and to validate on (about `fraction`).

    One label each (N,) is stratified: every class keeps at least one image to train on, and gives at least one to
    validate on if it has two. Several labels each (N, C) are not: all images are shuffled, see `random_split`.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DataError: an image has no label, or there are fewer than 2 images with several.
    """
    if labels.ndim == 2:
        return random_split(len(labels), fraction, seed)
    _refuse_fraction(fraction)
    train, val = [], []
    for members in _shuffled_classes(labels, seed):
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        val.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


def random_split(count: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split of `count` images whatever they show: sorted indices to train on and to validate on (about `fraction`).

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DataError: there are fewer than 2 images.
    """
    _refuse_fraction(fraction)
    if count < 2:
        raise DataError(f"{count} images cannot be split to train on some and validate on others; add images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(fraction * count)), count - 1)
    return order[held:].sort().values, order[:held].sort().values


def few_shot(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Sorted indices of `shots` images of every class in labels (N,), drawn without replacement.

    Raises:
        DataError: a class has fewer than `shots` images, or an image has no label, or may have several.
    """
    if labels.ndim == 2:
        raise DataError(
            "few-shot draws take so many images of each class, but these have several labels each; use logreg_multi "
            "or knn_multi"
        )
    drawn = []
    for members in _shuffled_classes(labels, seed):
        if len(members) < shots:
            raise DataError(
                f"class {int(labels[members[0]])} has {len(members)} images, fewer than the {shots} shots; "
                "ask for fewer shots or add labelled images"
            )
        drawn.append(members[:shots])
    return torch.cat(drawn).sort().values


def _refuse_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ConfigError(f"validation fraction {fraction}: expected a number between 0 and 1")


def _shuffled_classes(labels: Tensor, seed: int) -> list[Tensor]:
    if len(labels) == 0 or int(labels.min()) < 0:
        raise DataError("these images are not all labelled; pack them with one folder per class")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return [order[labels[order] == label] for label in labels.unique()]


@torch.inference_mode()
def _forward(
    vit: ViT, shards: ShardSet, view: Views, inference: Inference, blocks: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Class tokens (B, n, D), mean patch (B, D) and labels (B,) or (B, C) of each batch, on the CPU."""
    for batch in inference.batches(shards, view):
        with inference.autocast():
            tokens = vit.features(batch["image"], blocks=blocks)
        assert tokens.cls.shape[1:] == (blocks, vit.width), f"class tokens of shape {tuple(tokens.cls.shape)}"
        labels = batch["label"].cpu()
        yield tokens.cls.float().cpu(), tokens.mean.float().cpu(), labels if labels.ndim == 2 else labels.long()


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _content(tensors: dict[str, Tensor]) -> str:
    return _digest(*(tensors[name].contiguous().numpy() for name in ("cls", "mean", "labels")))


def _cache_name(*recipe: object) -> str:
    return _digest(json.dumps([_FORMAT, *recipe], sort_keys=True).encode()) + ".safetensors"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot make the folder of the feature cache: {error}") from error


def _save(path: Path, features: Features) -> None:
    tensors = {"cls": features.cls, "mean": features.mean, "labels": features.labels}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"sha256": _content(tensors)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot write the feature cache: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path, fingerprint: str, classes: list[str] | None) -> Features | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("cls", "mean", "labels")}
    except SafetensorError:
        return None
    if metadata.get("sha256") != _content(tensors):
        return None
    return Features(**tensors, classes=classes, fingerprint=fingerprint)
