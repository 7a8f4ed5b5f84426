"""Block Expansion (Bafghi et al. 2024): copies of some blocks between the others learn, from the identity on."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from explora.adapt.base import Method, block_of
from explora.errors import ConfigError
from explora.models.vit import ViT, build


class Expansion(Method):
    """A deeper model: after every so many blocks a copy of the last of them, which adds nothing until it learns.

    Source: arXiv 2404.17245. In a copy the layers that end its two branches are zero, weights and biases; the rest is
    the source block's. All of the copies learns, nothing else does. Of L blocks p = L // every get one: the paper's
    p = 1 of 12 is `every: 11`, p = 2 is 6, p = 3 is 4, p = 4 is 3. Copies share no tensor with their sources.
    Afterwards the model is a plain ViT of another depth, which can be expanded again.
    """

    name: Literal["expansion"] = "expansion"
    """Picks this method."""
    every: int = Field(4, ge=1)
    """Source blocks before each copy; 4 of 12 is p = 3, where the paper's mean of old and new accuracy is highest."""

    def modify(self, vit: ViT) -> None:
        if vit.additions:
            raise ConfigError(
                f"adapt: 'expansion' copies the blocks of a plain ViT, not those with {' and '.join(vit.additions)}; "
                "start from weights without, or take another method"
            )
        if self.every > vit.depth:
            raise ConfigError(f"adapt.every: {self.every} in a model of {vit.depth} blocks; use 1 to {vit.depth}")
        for index in range(vit.depth + vit.depth // self.every):
            if self._is_new(index):
                vit.blocks.insert(index, _silent_copy(vit.blocks[index - 1]))
        vit.depth = len(vit.blocks)
        vit.options = {**vit.options, "depth": vit.depth}

    def trains(self, name: str, vit: ViT) -> bool:
        block = block_of(name)
        return block is not None and self._is_new(block)

    def strip(self, vit: ViT) -> None:
        for index in reversed(range(vit.depth)):
            if self._is_new(index):
                del vit.blocks[index]
        vit.depth = len(vit.blocks)
        vit.options = _options_of_depth(vit)

    def _is_new(self, index: int) -> bool:
        """Whether a block of the deeper model is a copy: the last of each run of `every` blocks and one."""
        return (index + 1) % (self.every + 1) == 0


def _silent_copy(block: Any) -> nn.Module:
    """The block once more, with tensors of its own; LayerScale stays, or nothing would ever learn through it."""
    copied = copy.deepcopy(block)
    with torch.no_grad():
        for last in (copied.attn.proj, copied.mlp.fc2):
            for parameter in last.parameters():
                parameter.zero_()
    return copied


def _options_of_depth(vit: ViT) -> dict[str, Any]:
    """The options of a model of this depth, which is among them only where the named architecture has another.

    Whether they named the architecture's own depth before nobody knows any more; without it they mean the same.
    """
    others = {name: value for name, value in vit.options.items() if name != "depth"}
    with torch.device("meta"):
        own = build(vit.name, vit.image_size, others).depth
    return others if vit.depth == own else {**vit.options, "depth": vit.depth}
