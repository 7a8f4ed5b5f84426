"""Low-rank adaptation of chosen linear maps: LoRA (Hu et al. 2022), rsLoRA, DoRA; the base keeps its names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.adapt.base import Method
from explora.adapt.merged import Parts, merged_linear
from explora.adapt.places import Adopted, Place, Target, places, plain, replace
from explora.errors import ConfigError
from explora.models.vit import ViT

MAX_SCALE = 16.0
"""The largest factor on low-rank terms that is taken for meant: practice is 1/64 to 2."""


class LoRALinear(Adopted):
    """y = W x + b + s B (A x), for the whole output or for some of its equal parts.

    It adopts `weight` and `bias` of the layer it replaces, so their names stay; `lora_a` (parts x rank, in) and
    `lora_b` (parts, out / pieces, rank) join them. A fused qkv layer has three pieces, of which `parts` are
    adapted: one product with the stacked A, one with the block-diagonal B.

    With DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5) `lora_m` (parts, out / pieces) joins them as well:
    y = (1 + m) |W| / |W + s B A| (W + s B A) x + b, with norms of rows. The paper's magnitude is (1 + m) |W|; m is 0
    at the start, so that weight decay pulls to the source.

    Args:
        scale: s, the factor on the low-rank terms.
    """

    added = ("lora_a", "lora_b", "lora_m")
    lora_m: nn.Parameter | None

    def __init__(self, place: Place, rank: int, scale: float, dora: bool = False) -> None:
        super().__init__(place.base)
        self.parts, self.pieces, self.rank, self.scale = place.parts, place.pieces, rank, scale
        like: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(len(self.parts) * rank, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(len(self.parts), place.width, rank, **like))
        self.lora_m = nn.Parameter(torch.zeros(len(self.parts), place.width, **like)) if dora else None
        for part in self.lora_a.chunk(len(self.parts)):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))

    def terms(self) -> Tensor:
        """The B (parts, width, rank) that counts; a layer with gates closes some of it here."""
        return self.lora_b

    def forward(self, x: Tensor) -> Tensor:
        if self.sums and not self._learns:
            parts = Parts(self.parts, self.pieces, self.scale)
            return merged_linear(x, self.weight, self.bias, self.lora_a, self.terms(), parts)
        low, b = F.linear(x, self.lora_a), self.scale * self._stacked(self.terms())
        y = F.linear(x, self.weight, self.bias)
        if self.lora_m is None:
            return y + F.linear(low, b)
        gain = self._gain(self.lora_m)
        unbiased = y if self.bias is None else y - self.bias.to(y.dtype)
        # Added to y, not multiplied into it: a gain of 1 leaves every bit.
        return y + (gain - 1).to(y.dtype) * unbiased + F.linear(low, gain[:, None] * b)

    @property
    def sums(self) -> bool:
        """Whether a product with W + s B A will do, for which W is kept in the format of B A; see `merged_linear`."""
        return self.lora_m is None

    @property
    def _learns(self) -> bool:
        """Whether the base gets gradients of its own now."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in (self.weight, self.bias) if p is not None)

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            weight = self.weight + self.scale * (self._stacked(self.terms()) @ self.lora_a)
            return plain(self, weight if self.lora_m is None else self._gain(self.lora_m)[:, None] * weight)

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

    def _gain(self, m_PW: Tensor) -> Tensor:
        """DoRA's factor on each row of W + s B A, (out,); 1 where a part has no low-rank term."""
        gain_PW = (1 + m_PW) * torch.stack([self._shrinkage(number) for number in range(len(self.parts))])
        ones = torch.ones_like(gain_PW[0])
        rows = [gain_PW[self.parts.index(piece)] if piece in self.parts else ones for piece in range(self.pieces)]
        return torch.cat(rows)

    @torch.no_grad()  # the norm counts as a constant: section 4.3 of the paper
    def _shrinkage(self, number: int) -> Tensor:
        """|W| / |W + s B A| of the rows of an adapted part, (width,), without the sum itself."""
        with torch.autocast(self.weight.device.type, enabled=False):
            a_RI, b_WR = self.lora_a.chunk(len(self.parts))[number], self.terms()[number]
            w_WI = self.weight.chunk(self.pieces)[self.parts[number]].to(a_RI.dtype)  # may be stored in bf16
            before = w_WI.square().sum(1)
            cross = (b_WR * (w_WI @ a_RI.T)).sum(1)
            own = ((b_WR @ (a_RI @ a_RI.T)) * b_WR).sum(1)
            after = before + 2 * self.scale * cross + self.scale**2 * own
            least = torch.finfo(before.dtype).tiny  # a row may be zero, and rounding may leave less
            return (before.clamp(min=least) / after.clamp(min=least)).sqrt()


class LoRA(Method):
    """Low-rank terms in every block, nothing else; the usual choice for supervised fine-tuning."""

    name: Literal["lora"] = "lora"
    """Picks this method."""
    rank: int = Field(8, ge=1)
    """Rank r of each low-rank term."""
    alpha: float = Field(8.0, gt=0)
    """Scale of the low-rank terms; what counts is alpha / rank, or with `rslora` alpha / sqrt(rank)."""
    targets: tuple[Target, ...] = Field(("q", "v"), min_length=1)
    """Linear maps that get a term: q, k, v, proj (attention), fc1, fc2 (MLP)."""
    rslora: bool = False
    """Whether alpha / sqrt(rank) counts, so that high ranks learn as fast (Kalajdzievski 2023, arXiv 2312.03732)."""
    dora: bool = False
    """Whether the magnitude of each row learns beside its direction (Liu et al. 2024, arXiv 2402.09353)."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def modify(self, vit: ViT) -> None:
        refuse_scale(self.rank, self.scale, rslora=self.rslora)  # `insert` would say it of alpha / rank
        make = partial(LoRALinear, dora=self.dora)
        insert(vit, range(vit.depth), self.targets, self.rank, self.scale, make=make)

    def trains(self, name: str, vit: ViT) -> bool:
        return is_lora(name)


def is_lora(name: str) -> bool:
    """Whether a parameter is a low-rank factor, or the magnitude beside it."""
    return name.rpartition(".")[2] in LoRALinear.added


def insert(
    model: nn.Module,
    blocks: Iterable[int],
    targets: tuple[Target, ...],
    rank: int,
    scale: float,
    key: str = "adapt",
    make: Callable[[Place, int, float], LoRALinear] = LoRALinear,
) -> None:
    """Give the named linear maps of some blocks their low-rank terms, in place; outputs do not change.

    Args:
        model: a ViT, or any module with timm's blocks as `blocks.N`, such as the decoder of a MAE.
        scale: the factor on the low-rank terms.
        key: where the settings stand in a config, for the messages.
        make: what goes to each place, from the place, the rank and the scale.

    Raises:
        ConfigError: the blocks lack a target, the scale is absurd, or the rank is none of a low-rank term.
    """
    refuse_scale(rank, scale, key)
    for place in list(places(model, blocks, targets, key)):
        refuse_rank(place, rank, key)
        assert not isinstance(place.base, LoRALinear), f"{place.name} has low-rank terms already"
        replace(model, place.name, make(place, rank, scale))


def refuse_scale(rank: int, scale: float, key: str = "adapt", rslora: bool = False) -> None:
    """Refuse a factor on the low-rank terms that no training survives."""
    if scale > MAX_SCALE:
        below, one = ("sqrt(rank)", math.sqrt(rank)) if rslora else ("rank", rank)
        raise ConfigError(
            f"{key}: alpha / {below} is {scale:g}, and above {MAX_SCALE:g} the low-rank terms run away at any usual "
            f"learning rate; lower alpha to {one:.3g} or less"
        )


def refuse_rank(place: Place, rank: int, key: str = "adapt") -> None:
    """Refuse a rank that is not low at some place."""
    most = min(place.base.in_features, place.width)
    if rank >= most:
        raise ConfigError(
            f"{key}: rank {rank} of the low-rank terms: {place.name} is {most} wide, so only a rank below that "
            f"is low; take {max(1, most // 4)} or less, or let the whole of it learn instead"
        )
