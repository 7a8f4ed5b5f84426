"""What a fine-tuned model's own head says of test images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from explora.data import Center, ShardSet
from explora.errors import WeightsError
from explora.evaluation import Inference, Result
from explora.evaluation.calibration import calibration_at
from explora.evaluation.multilabel import scored
from explora.models import ViT, read_tensors
from explora.objectives.supervised import classify

LABEL = "head"
"""What its results are called."""


def judge_head(vit: ViT, path: str, shards: ShardSet, view: Center, inference: Inference) -> Iterator[Result]:
    """Top-1 of the head in a head.safetensors on the test images; micro-mAP and LRAP where these have several labels.

    The calibration of the top-1 has a temperature where fine-tuning was validated on images that did not teach it,
    and recorded what they chose. Here none can be chosen: the file does not say which training images taught the head.

    Raises:
        WeightsError: the file is no head for the classes of these images.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("classes") != shards.classes or metadata.get("pool") not in ("cls", "mean", "cls_mean"):
        raise WeightsError(f"{path}: is no head for the classes of {shards.folder}")
    head = nn.Linear(tensors["weight"].shape[1], len(tensors["weight"]))
    head.load_state_dict(tensors)
    logits = _logits(vit, head.to(inference.device), metadata["pool"], shards, view, inference)
    if shards.multilabel:
        yield from scored(LABEL, logits.numpy(), shards.targets, shards.classes or [], {})
        return
    found, labels = logits.argmax(-1).numpy(), torch.from_numpy(shards.labels).long()
    calibrated = calibration_at(metadata.get("temperature"), logits, labels)
    yield Result.over(LABEL, found == shards.labels, {}, found, calibration=calibrated)


@torch.inference_mode()
def _logits(vit: ViT, head: nn.Linear, pool: str, shards: ShardSet, view: Center, inference: Inference) -> Tensor:
    """Logits (N, C) of all images, fp32, on the CPU."""
    found = []
    for batch in inference.batches(shards, view):
        with inference.autocast():
            found.append(classify(vit([batch["image"]])[0], head, pool).float().cpu())
    return torch.cat(found)
