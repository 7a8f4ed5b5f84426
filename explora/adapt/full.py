"""Full tuning: everything learns."""

from __future__ import annotations

from typing import Literal

from explora.adapt.base import Method
from explora.models.vit import ViT


class Full(Method):
    """Every parameter learns: the baseline that parameter-efficient methods are compared with."""

    name: Literal["full"] = "full"
    """Picks this method."""

    def trains(self, name: str, vit: ViT) -> bool:
        return True
