"""Transformer blocks for a MAE decoder: timm's, so that they bear the names of official checkpoints."""

from __future__ import annotations

from torch import nn

from explora.models.torchvision_compat import import_torchvision

import_torchvision()
from timm.models.vision_transformer import Block  # noqa: E402


def decoder_blocks(width: int, depth: int, heads: int) -> nn.ModuleList:
    """`depth` blocks, (B, T, width) to the same shape, without LayerScale; `width` is a multiple of `heads`."""
    return nn.ModuleList([Block(width, heads, qkv_bias=True) for _ in range(depth)])
