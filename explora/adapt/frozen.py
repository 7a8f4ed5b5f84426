"""No tuning: the backbone stays what it is."""

from __future__ import annotations

from typing import Literal

from explora.adapt.base import Method
from explora.models.vit import ViT


class Frozen(Method):
    """No parameter of the backbone learns; only what an objective adds to it, such as a head, does."""

    name: Literal["frozen"] = "frozen"
    """Picks this method."""

    def trains(self, name: str, vit: ViT) -> bool:
        return False
