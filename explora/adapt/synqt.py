"""SynQT: queries that read the frozen backbone from beside; all else is frozen."""

from __future__ import annotations

from typing import ClassVar, Literal

from explora.adapt.base import Method
from explora.models.extensions import SynQTSettings, extend, retract
from explora.models.vit import ViT


class SynQT(Method, SynQTSettings):
    """Synthesised queries (Zhang et al. 2024): another class token; patch tokens stay the source's, bit for bit.

    No gradient runs over image tokens, so that training keeps little for the backward pass. It cannot be merged: the
    result is an extended ViT, which explora alone reads. A model that its weights already gave queries goes on with
    these.
    """

    reaches_patches: ClassVar[bool] = False
    """Image tokens are only read."""
    name: Literal["synqt"] = "synqt"
    """Picks this method."""

    def modify(self, vit: ViT) -> None:
        extend(vit, self.name, self.model_dump(exclude={"name"}))

    def trains(self, name: str, vit: ViT) -> bool:
        return ".reader." in name or name.startswith("pool.")

    def strip(self, vit: ViT) -> None:
        if self.name not in vit.inherited:
            retract(vit, self.name)
