"""APT: memories beside the attention of every block; all else is frozen."""

from __future__ import annotations

from typing import Literal

from explora.adapt.base import Method
from explora.models.extensions import APTSettings, extend, retract
from explora.models.vit import ViT


class APT(Method, APTSettings):
    """Approximated prompt tuning (Wu et al. 2023): a small memory beside attention, in the place of long prompts.

    It cannot be merged: the result is an extended ViT, which explora alone reads. A model that its weights already
    gave memories goes on with these.
    """

    name: Literal["apt"] = "apt"
    """Picks this method."""

    def modify(self, vit: ViT) -> None:
        extend(vit, self.name, self.model_dump(exclude={"name"}))

    def trains(self, name: str, vit: ViT) -> bool:
        return ".memory." in name

    def strip(self, vit: ViT) -> None:
        if self.name not in vit.inherited:
            retract(vit, self.name)
