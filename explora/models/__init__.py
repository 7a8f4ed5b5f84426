"""Backbones: build, load, export."""

from explora.models.vit import BlockFeatures, Tokens, ViT, build
from explora.models.weights import (
    Account,
    ModelConfig,
    fill,
    fingerprint,
    load_backbone,
    load_model,
    read_tensors,
)

__all__ = [
    "Account",
    "BlockFeatures",
    "ModelConfig",
    "Tokens",
    "ViT",
    "build",
    "fill",
    "fingerprint",
    "load_backbone",
    "load_model",
    "read_tensors",
]
