"""The projection head that DINO and iBOT share: an MLP, the unit sphere, prototypes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explora.objectives.losses import widen
from explora.objectives.prototypes import directions


class Prototypes(nn.Module):
    """K weight-normalised directions; the names are those of the official heads."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(nn.Linear(width, prototypes, bias=False).weight.detach().clone())

    entries = ("directions",)
    """The methods other than `forward` through which it is entered from outside."""

    def directions(self) -> Tensor:
        """(K, width), in the precision of products."""
        return self._directions()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._directions())

    def _directions(self) -> Tensor:
        return directions(self.weight_v, self.weight_g)


class DINOHead(nn.Module):
    """(..., width) to logits of K prototypes (..., K).

    Source: DINOv2, `DINOHead`: Linear-GELU layers to a bottleneck, L2 normalisation, weight-normalised prototypes.
    """

    def __init__(self, width: int, prototypes: int, hidden: int, bottleneck: int, layers: int) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for size_in, size_out in pairwise(sizes):
            linear = nn.Linear(size_in, size_out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            modules += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last_layer = Prototypes(bottleneck, prototypes)

    def points(self, x: Tensor) -> Tensor:
        """(..., bottleneck) on the unit sphere, in fp32 or wider; their logits are one product away."""
        return F.normalize(widen(self.mlp(x)), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(self.points(x))
