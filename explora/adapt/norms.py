"""LayerNorm tuning: the scales and shifts of all norms learn."""

from __future__ import annotations

from typing import Literal

from explora.adapt.base import Method, is_norm
from explora.models.vit import ViT


class Norms(Method):
    """Train all LayerNorms and nothing else, 0.04 % of a ViT-B (De Min et al. 2023, arXiv 2308.09610)."""

    name: Literal["norms"] = "norms"
    """Picks this method."""

    def trains(self, name: str, vit: ViT) -> bool:
        return is_norm(name)
