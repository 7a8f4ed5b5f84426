"""(IA)^3 (Liu et al. 2022): learnt factors on keys, values and the hidden activations of each MLP."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explora.adapt.base import Method
from explora.adapt.places import Adopted, Place, Target, places, plain, replace
from explora.models.vit import ViT

_TARGETS: tuple[Target, ...] = ("k", "proj", "fc2")


class _Scaled(Adopted):
    """A linear layer that adopts `weight` and `bias` of another; `ia3_offset` joins them, by which a factor is off 1.

    An offset, because weight decay draws to zero, and zero is to be where nothing changes.
    """

    added = ("ia3_offset",)

    def __init__(self, base: nn.Linear, width: int) -> None:
        super().__init__(base)
        like: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.ia3_offset = nn.Parameter(torch.zeros(width, **like))


class ScaledInputs(_Scaled):
    """y = W (l * x) + b, the factors l (in)."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.base, place.base.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x * (1 + self.ia3_offset)).to(x.dtype), self.weight, self.bias)

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            return plain(self, self.weight * (1 + self.ia3_offset))


class ScaledKeys(_Scaled):
    """y = W x + b of a fused qkv layer, with its keys times the factors l (out / 3)."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.base, place.width)

    def _factors(self) -> Tensor:
        """l for each output, 1 for queries and values."""
        return 1 + F.pad(self.ia3_offset, (len(self.ia3_offset), len(self.ia3_offset)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return (y * self._factors()).to(y.dtype)  # bf16 stays bf16 under autocast, for attention

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            factors = self._factors()
            bias = None if self.bias is None else self.bias * factors
            return plain(self, self.weight * factors[:, None], bias)


class IA3(Method):
    """Factors l_k on keys, l_v on values and l_ff on the inputs of each MLP's last layer, 55,296 in a ViT-B.

    Source: arXiv 2205.05638, section 3.3. l_v acts on what attention hands to `proj`: as each token's weights sum over
    tokens, never over channels, that is the same number as on values, whether their bias is part of `qkv` or, in
    DINOv3, beside it (a norm between attention and `proj`, which few models have, comes before l_v). Keys of DINOv3
    have no bias. T-Few trains at a rate of 3e-3.
    """

    name: Literal["ia3"] = "ia3"
    """Picks this method."""

    def modify(self, vit: ViT) -> None:
        for place in list(places(vit, range(vit.depth), _TARGETS)):
            assert not isinstance(place.base, _Scaled), f"{place.name} has factors already"
            scaled = ScaledKeys if place.pieces == 3 else ScaledInputs
            replace(vit, place.name, scaled(place))

    def trains(self, name: str, vit: ViT) -> bool:
        return name.endswith(".ia3_offset")
