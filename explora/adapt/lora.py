"""Low-rank adaptation (Hu et al. 2022) of chosen linear maps; the base keeps its names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.adapt.base import Method, replace
from explora.errors import ConfigError
from explora.models.vit import ViT

Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
_MODULES: dict[str, tuple[str, ...]] = {
    "proj": ("attn.proj",),
    "fc1": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x"),  # a SwiGLU may keep its gate apart
    "fc2": ("mlp.fc2",),
}
MAX_SCALE = 16.0
"""The largest alpha / rank that is taken for meant: practice is 1/64 to 2."""


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha / r) B (A x), for the whole output or for some of its equal parts.

    It adopts `weight` and `bias` of the layer it replaces, so their names stay; `lora_a` (parts x rank, in) and
    `lora_b` (parts, out / pieces, rank) join them. A fused qkv layer has three pieces, of which `parts` are
    adapted: one product with the stacked A, one with the block-diagonal B.

    Args:
        base: the layer to adopt.
        parts: which of the `pieces` equal parts of the output get a low-rank term.
    """

    def __init__(self, base: nn.Linear, parts: tuple[int, ...], pieces: int, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # adopt the weight instead of allocating one
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.parts, self.pieces, self.rank, self.scale = parts, pieces, rank, scale
        width = self.out_features // pieces
        like: Any = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(len(parts) * rank, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(len(parts), width, rank, **like))
        for part in self.lora_a.chunk(len(parts)):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    def _stacked_b(self) -> Tensor:
        """B as one (out, parts x rank) matrix with zeros where a part has no low-rank term."""
        columns = len(self.parts) * self.rank
        rows = []
        for piece in range(self.pieces):
            if piece in self.parts:
                place = self.parts.index(piece) * self.rank
                rows.append(F.pad(self.lora_b[self.parts.index(piece)], (place, columns - place - self.rank)))
            else:
                rows.append(self.lora_b.new_zeros(self.lora_b.shape[1], columns))
        return torch.cat(rows)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a)
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.scale * self._stacked_b())

    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        with torch.no_grad():
            delta = self.scale * (self._stacked_b() @ self.lora_a)
        plain.weight = nn.Parameter((self.weight + delta).detach(), requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain


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
    if scale > MAX_SCALE:
        raise ConfigError(
            f"{key}: alpha / rank is {scale:g}, and above {MAX_SCALE:g} the low-rank terms run away at any usual "
            f"learning rate; lower alpha to {rank} or less"
        )
    parts = tuple(number for number, letter in enumerate("qkv") if letter in targets)
    wanted: list[tuple[tuple[str, ...], tuple[int, ...], int]] = [(("attn.qkv",), parts, 3)] if parts else []
    wanted += [(_MODULES[target], (0,), 1) for target in targets if target in _MODULES]
    for index in sorted(blocks):
        for places, adapted, pieces in wanted:
            for name, base in _linears(model, f"blocks.{index}", places, key).items():
                most = min(base.in_features, base.out_features // pieces)
                if rank >= most:
                    raise ConfigError(
                        f"{key}: rank {rank} of the low-rank terms: {name} is {most} wide, so only a rank below that "
                        f"is low; take {max(1, most // 4)} or less, or let the whole of it learn instead"
                    )
                assert not isinstance(base, LoRALinear), f"{name} has low-rank terms already"
                replace(model, name, LoRALinear(base, adapted, pieces, rank, scale))


def merge(model: nn.Module) -> None:
    """Fold every low-rank term into its weight, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            replace(model, name, module.merged())


def _linears(model: nn.Module, block: str, places: tuple[str, ...], key: str) -> dict[str, nn.Linear]:
    inside = dict(model.get_submodule(block).named_modules())
    found = {f"{block}.{place}": inside[place] for place in places if isinstance(inside.get(place), nn.Linear)}
    if not found:
        raise ConfigError(f"{key}.targets: {block} has no linear map {' or '.join(places)}; leave this target out")
    return cast(dict[str, nn.Linear], found)
