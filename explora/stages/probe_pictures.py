"""What a probe leaves to look at: patch features as colours, attention of the class token, a map of all test images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from explora.data import Center, Key, ShardSet, crops
from explora.evaluation import Features
from explora.evaluation.pictures import attention_pictures, embedding_map, pca_pictures, subsample
from explora.models import ViT


@torch.inference_mode()
def pictures_of(
    name: str,
    vit: ViT,
    shards: ShardSet,
    view: Center,
    features: Features,
    count: int,
    device: torch.device,
    before: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Arrays of pictures.npz for one model, by name; the images and labels themselves with the first model's only.

    `before` are those of the models before it, whose colours it follows; `features` are of all test images.
    """
    count = min(count, len(shards))
    if count == 0:
        return {}
    chosen = np.linspace(0, len(shards) - 1, count).round().astype(int)
    batch = crops(shards, view, [Key(0, 0, int(i)) for i in chosen])
    images = view.finish({key: value.to(device) for key, value in batch.items()})["image"]
    first = next((array for key, array in before.items() if key.endswith("__pca")), None)
    mapped = features.take(subsample(features.labels))
    found = {
        f"{name}__pca": pca_pictures(vit.features(images).patches.cpu(), first),
        f"{name}__attention": attention_pictures(vit, images),
        f"{name}__map": embedding_map(mapped),
    }
    if first is not None:
        return found
    labels = {} if mapped.multilabel else {"map__labels": mapped.labels.numpy()}
    return {**found, **labels, "images": view.pixels(images)}
