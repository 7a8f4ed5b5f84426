"""Low-rank adaptation (Hu et al. 2022) of chosen linear maps; the base keeps its names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.adapt.base import Method
from explora.adapt.places import Place, Target, adopt, places, plain, replace
from explora.errors import ConfigError
from explora.models.additions import Addition
from explora.models.vit import ViT

MAX_SCALE = 16.0
"""The largest alpha / rank that is taken for meant: practice is 1/64 to 2."""


class LoRALinear(nn.Linear, Addition):
    """y = W x + b + (alpha / r) B (A x), for the whole output or for some of its equal parts.

    It adopts `weight` and `bias` of the layer it replaces, so their names stay; `lora_a` (parts x rank, in) and
    `lora_b` (parts, out / pieces, rank) join them. A fused qkv layer has three pieces, of which `parts` are
    adapted: one product with the stacked A, one with the block-diagonal B.
    """

    added = ("lora_a", "lora_b")

    def __init__(self, place: Place, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # adopt the weight instead of allocating one
        adopt(self, place.base)
        self.parts, self.pieces, self.rank, self.scale = place.parts, place.pieces, rank, scale
        like: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(len(self.parts) * rank, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(len(self.parts), place.width, rank, **like))
        for part in self.lora_a.chunk(len(self.parts)):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    def _stacked(self, b_PWR: Tensor) -> Tensor:
        """B as one (out, parts x rank) matrix with zeros where a part has no low-rank term."""
        columns = len(self.parts) * self.rank
        rows = []
        for piece in range(self.pieces):
            if piece in self.parts:
                place = self.parts.index(piece) * self.rank
                rows.append(F.pad(b_PWR[self.parts.index(piece)], (place, columns - place - self.rank)))
            else:
                rows.append(b_PWR.new_zeros(b_PWR.shape[1], columns))
        return torch.cat(rows)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a)
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.scale * self._stacked(self.lora_b))

    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs."""
        with torch.no_grad():
            delta = self.scale * (self._stacked(self.lora_b) @ self.lora_a)
        return plain(self, self.weight + delta)


class LoRA(Method):
    """Low-rank terms in every block, nothing else; the usual choice for supervised fine-tuning."""

    name: Literal["lora"] = "lora"
    """Picks this method."""
    rank: int = Field(8, ge=1)
    """Rank r of each low-rank term."""
    alpha: float = Field(8.0, gt=0)
    """Scale of the low-rank terms; what counts is alpha / rank."""
    targets: tuple[Target, ...] = Field(("q", "v"), min_length=1)
    """Linear maps that get a term: q, k, v, proj (attention), fc1, fc2 (MLP)."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def modify(self, vit: ViT) -> None:
        insert(vit, range(vit.depth), self.targets, self.rank, self.scale)

    def trains(self, name: str, vit: ViT) -> bool:
        return is_lora(name)

    def merge(self, vit: ViT) -> None:
        merge(vit)

    def strip(self, vit: ViT) -> None:
        strip(vit)


def is_lora(name: str) -> bool:
    """Whether a parameter is a low-rank factor."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


def insert(
    model: nn.Module, blocks: Iterable[int], targets: tuple[Target, ...], rank: int, scale: float, key: str = "adapt"
) -> None:
    """Give the named linear maps of some blocks their low-rank terms, in place; outputs do not change.

    Args:
        model: a ViT, or any module with timm's blocks as `blocks.N`, such as the decoder of a MAE.
        scale: alpha / rank.
        key: where the settings stand in a config, for the messages.

    Raises:
        ConfigError: the blocks lack a target, alpha / rank is absurd, or the rank is none of a low-rank term.
    """
    refuse_scale(rank, scale, key)
    for place in list(places(model, blocks, targets, key)):
        refuse_rank(place, rank, key)
        assert not isinstance(place.base, LoRALinear), f"{place.name} has low-rank terms already"
        replace(model, place.name, LoRALinear(place, rank, scale))


def refuse_scale(rank: int, scale: float, key: str = "adapt") -> None:
    """Refuse a factor on the low-rank terms that no training survives."""
    if scale > MAX_SCALE:
        raise ConfigError(
            f"{key}: alpha / rank is {scale:g}, and above {MAX_SCALE:g} the low-rank terms run away at any usual "
            f"learning rate; lower alpha to {rank} or less"
        )


def refuse_rank(place: Place, rank: int, key: str = "adapt") -> None:
    """Refuse a rank that is not low at some place."""
    most = min(place.base.in_features, place.width)
    if rank >= most:
        raise ConfigError(
            f"{key}: rank {rank} of the low-rank terms: {place.name} is {most} wide, so only a rank below that "
            f"is low; take {max(1, most // 4)} or less, or let the whole of it learn instead"
        )


def merge(model: nn.Module) -> None:
    """Fold every low-rank term into its weight, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            replace(model, name, module.merged())


def strip(model: nn.Module) -> None:
    """Take every low-rank term off again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            replace(model, name, plain(module))
