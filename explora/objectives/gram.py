"""Gram anchoring (DINOv3, Simeoni et al. 2025): patches stay as similar to each other as the source model saw them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from explora.objectives.losses import widen


def gram_loss(patches_BND: Tensor, anchors_BND: Tensor) -> Tensor:
    """Mean squared difference of the two Gram matrices (N x N cosine similarities) of each image, in fp32.

    Source: DINOv3; averaged over entries, as its code does, all patches of an image taking part.
    """
    with torch.autocast(patches_BND.device.type, enabled=False):
        return F.mse_loss(_similarities(patches_BND), _similarities(anchors_BND))


def _similarities(patches_BND: Tensor) -> Tensor:
    unit = F.normalize(widen(patches_BND), dim=-1)
    return unit @ unit.transpose(1, 2)
