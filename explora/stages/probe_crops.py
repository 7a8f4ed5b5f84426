"""The passes of the linear protocol with random crops: every step's crops through the frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from explora.data import Center, Crop, ShardSet, Stream
from explora.evaluation import Features, Inference, LinearCrops
from explora.models import ViT

_SCALE = (0.08, 1.0)
"""Share of an image that a crop covers, as in DINOv2's linear protocol; every other crop is flipped."""


@torch.inference_mode()
def crop_features(
    vit: ViT, shards: ShardSet, view: Center, settings: LinearCrops, blocks: int, inference: Inference
) -> Iterator[Features]:
    """Features of the random crops of each step, size and range of values as in `view`, labels beside them.

    Raises:
        DataError: too many images cannot be read.
    """
    same = {key: getattr(view, key) for key in ("bands", "scaling", "mean", "std", "size")}
    crop = Crop(**same, scale=_SCALE)
    stream = Stream(shards, crop, batch_size=settings.batch_size, seed=settings.seed, workers=inference.workers)
    for step in stream.steps(settings.steps):
        (raw,) = step.micro_batches
        batch = inference.finished(raw, crop)
        with inference.autocast():
            tokens = vit.features(batch["image"], blocks=min(blocks, vit.depth))
        yield Features(
            tokens.cls.float().cpu(),
            tokens.mean.float().cpu(),
            batch["label"].cpu(),
            shards.classes,
            f"step {step.index}",
        )
