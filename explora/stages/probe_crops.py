"""The passes of the linear protocol with random crops: every step's crops through the frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from explora.data import Center, Crop, ShardSet, Stream
from explora.distributed import Precision, autocast
from explora.evaluation import Features
from explora.models import ViT

_SCALE = (0.08, 1.0)
"""Share of an image that a crop covers, as in DINOv2's linear protocol; every other crop is flipped."""


@torch.inference_mode()
def crop_features(
    vit: ViT,
    shards: ShardSet,
    view: Center,
    *,
    blocks: int,
    steps: int,
    batch_size: int,
    seed: int,
    workers: int,
    device: torch.device,
    precision: Precision,
) -> Iterator[Features]:
    """Features of the random crops of each step, size and range of values as in `view`, labels beside them.

    Raises:
        DataError: too many images cannot be read.
    """
    same = {key: getattr(view, key) for key in ("bands", "scaling", "mean", "std", "size")}
    crop = Crop(**same, scale=_SCALE)
    stream = Stream(shards, crop, batch_size=batch_size, seed=seed, workers=workers)
    for step in stream.steps(steps):
        (raw,) = step.micro_batches
        batch: dict[str, Tensor] = crop.finish({name: value.to(device) for name, value in raw.items()})
        with autocast(device, precision):
            tokens = vit.features(batch["image"], blocks=min(blocks, vit.depth))
        yield Features(
            tokens.cls.float().cpu(),
            tokens.mean.float().cpu(),
            batch["label"].cpu(),
            shards.classes,
            f"step {step.index}",
        )
