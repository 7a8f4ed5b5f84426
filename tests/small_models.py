"""Small models with random weights, for the tests that read and write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from explora.models import Loaded, ModelConfig, ViT, build, load_model

SIZE = 32
NAME = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def scatter(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny(name: str = NAME, **options: Any) -> ViT:
    torch.manual_seed(0)
    return scatter(build(name, SIZE, {**TINY, **options})).eval()


def load(path: Path, **config: Any) -> Loaded:
    return load_model(ModelConfig(weights=str(path), **config))


def same(one: ViT, other: ViT, *but: str) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first if n not in but)


@torch.no_grad()
def outputs(vit: ViT) -> Tensor:
    """What a model makes of two fixed images of 32 pixels, class token first."""
    torch.manual_seed(1)
    tokens = vit([torch.randn(2, 3, 32, 32)])[0]
    return torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)


def loss_of(vit: ViT) -> Tensor:
    """How far half of the channels are from 1; of all of them the final norm would leave nothing to learn."""
    return (vit([torch.randn(2, 3, 32, 32)])[0].patches_BND[..., :16] - 1).square().mean()
