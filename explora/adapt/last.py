"""The blocks nearest the output learn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from explora.adapt.base import Method, block_of
from explora.errors import ConfigError
from explora.models.vit import ViT


class Last(Method):
    """Train the last blocks in full: `Top-3` of Bafghi et al. 2024 (arXiv 2404.17245) is `blocks: 3`."""

    name: Literal["last"] = "last"
    """Picks this method."""
    blocks: int = Field(1, ge=1)
    """How many blocks, counted from the output."""
    norm: bool = False
    """Whether the final norm learns as well."""

    def modify(self, vit: ViT) -> None:
        if self.blocks > vit.depth:
            raise ConfigError(f"adapt.blocks: {self.blocks} of a model of {vit.depth} blocks; use 1 to {vit.depth}")

    def trains(self, name: str, vit: ViT) -> bool:
        block = block_of(name)
        return self.norm and name.startswith("norm.") if block is None else block >= vit.depth - self.blocks
