"""Backbones: build, load, export."""

from explora.models.vit import BlockFeatures, Tokens, ViT, build
from explora.models.weights import (
    Account,
    Loaded,
    ModelConfig,
    Source,
    fill,
    fingerprint,
    load_backbone,
    load_model,
    read_tensors,
)

__all__ = [
    "Account",
    "BlockFeatures",
    "Loaded",
    "ModelConfig",
    "Source",
    "Tokens",
    "ViT",
    "build",
    "fill",
    "fingerprint",
    "load_backbone",
    "load_model",
    "read_tensors",
]
