"""BitFit: all biases learn."""

from __future__ import annotations

from typing import Literal

from explora.adapt.base import Method
from explora.models.vit import ViT


class Bias(Method):
    """Train all biases, those of norms too, and nothing else (Ben Zaken et al. 2022, arXiv 2106.10199)."""

    name: Literal["bias"] = "bias"
    """Picks this method."""

    def trains(self, name: str, vit: ViT) -> bool:
        return name.endswith("bias")
