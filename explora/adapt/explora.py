"""ExPLoRA (Khanna et al. 2025): some blocks in full, all norms, LoRA elsewhere."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from explora.adapt import lora
from explora.adapt.base import Method, block_of, is_norm, resolve_blocks
from explora.adapt.places import Target
from explora.models.vit import ViT


class ExPLoRA(Method):
    """Train the blocks U in full, LoRA of rank r on q and v of the others, and every norm.

    Source: arXiv 2406.10973, section 4. `alpha: 1` with `rank: 64` is the paper's pair.
    """

    name: Literal["explora"] = "explora"
    """Picks this method."""
    blocks: tuple[int, ...] = (-1,)
    """U: blocks trained in full, counted from 0; negative ones from the end."""
    rank: int = Field(64, ge=1)
    """Rank r of the low-rank terms in the other blocks."""
    alpha: float = Field(1.0, gt=0)
    """Scale of the low-rank terms; what counts is alpha / rank."""
    targets: tuple[Target, ...] = ("q", "v")
    """Linear maps that get a low-rank term; an empty list trains U and the norms alone."""
    norms: bool = True
    """Whether all norms learn."""
    cls_token: bool = True
    """Whether the class token learns."""
    mask_token: bool = False
    """Whether the mask token learns: useful where the source never saw one."""
    patch_embed: bool = False
    """Whether the patch embedding learns: needed when bands are new."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def modify(self, vit: ViT) -> None:
        others = frozenset(range(vit.depth)) - resolve_blocks(self.blocks, vit.depth)
        lora.insert(vit, others, self.targets, self.rank, self.scale)

    def trains(self, name: str, vit: ViT) -> bool:
        if block_of(name) in resolve_blocks(self.blocks, vit.depth) or lora.is_lora(name):
            return True
        tokens = {"cls_token": self.cls_token, "mask_token": self.mask_token}
        if self.patch_embed and name.startswith("patch_embed."):
            return True
        return tokens.get(name, self.norms and is_norm(name))
