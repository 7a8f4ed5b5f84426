"""Selective LoRA (Bafghi et al. 2025): low-rank terms behind gates that learn which few of them are needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from explora.adapt import gates, lora
from explora.adapt.base import Method, Moments
from explora.adapt.lora import LoRALinear
from explora.adapt.places import Place, Target, places, plain, replace
from explora.errors import ConfigError
from explora.models.vit import ViT
from explora.schedules import Length, LengthField, Progress

logger = logging.getLogger("explora")


class GatedLoRALinear(LoRALinear):
    """A LoRALinear whose adapted parts each have a score, `lora_score` (parts,), and count from tau upward."""

    added: ClassVar[Any] = (*LoRALinear.added, "lora_score")

    def __init__(self, place: Place, rank: int, scale: float, tau: float, start: float) -> None:
        super().__init__(place, rank, scale)
        self.tau = tau
        self.lora_score = nn.Parameter(torch.full_like(self.lora_b[:, 0, 0], start))

    @property
    def open_P(self) -> Tensor:
        """Which parts count now, as booleans (parts,)."""
        return self.lora_score.detach() >= self.tau

    def terms(self) -> Tensor:
        return gates.threshold(self.lora_score, self.tau)[:, None, None] * self.lora_b

    def hold(self, moments: Moments) -> None:
        """Let the factors of closed parts stand where they are: no gradient reaches them, nor may momentum."""
        closed_P = ~self.open_P
        gates.forget(self.lora_a, closed_P.repeat_interleave(self.rank)[:, None], moments)
        gates.forget(self.lora_b, closed_P[:, None, None], moments)

    def opened(self) -> nn.Linear:
        """A layer with the same outputs that has the open parts alone: a LoRALinear, or a plain one without any."""
        numbers = self.open_P.nonzero().flatten().tolist()
        if not numbers:
            return plain(self)
        left = LoRALinear(Place("", self, tuple(self.parts[n] for n in numbers), self.pieces), self.rank, self.scale)
        left.lora_a.copy_(self.lora_a.unflatten(0, (len(self.parts), self.rank))[numbers].flatten(0, 1))
        left.lora_b.copy_(self.lora_b[numbers])
        return left


class Selective(Method):
    """LoRA on every target, each term behind a gate; a penalty closes those that the task does not need.

    Source: arXiv 2501.15377, with the objective of its parent TAPS (arXiv 2203.16708): the loss plus
    `sparsity` * mean |score|, and a gate that is open where score >= `threshold`. The paper's own values of threshold,
    start, penalty and rates are not known; the defaults are TAPS's where it has any. How many terms stay is an
    outcome, logged as `open_blocks` in percent: sweep `sparsity`, or set `top_k`.

    Weight decay acts neither on scores nor on factors, so that a closed term is found where it closed.
    """

    whole = True

    name: Literal["selective"] = "selective"
    """Picks this method."""
    rank: int = Field(8, ge=1)
    """Rank r of each low-rank term."""
    alpha: float = Field(8.0, gt=0)
    """Scale of the low-rank terms; what counts is alpha / rank."""
    targets: tuple[Target, ...] = Field(("q", "v"), min_length=1)
    """Linear maps that get a term: q, k, v, proj (attention), fc1, fc2 (MLP)."""
    threshold: float = Field(0.1, gt=0)
    """Tau: a term counts where its score is at least this."""
    start: float = Field(0.15, gt=0)
    """Every score at the start; above `threshold`, so that all terms are open."""
    sparsity: float = Field(0.1, ge=0)
    """Lambda, the weight of mean |score| in the loss: the low end of TAPS's grid; the paper's value is unknown."""
    warmup: LengthField = Length(10, "%")
    """Length without penalty, one step at least: terms that start at zero must first show what they are good for."""
    score_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the scores: under AdamW about the distance that one moves in a step."""
    top_k: int | None = Field(None, ge=1)
    """A budget, our extension: from the end of `warmup` on exactly so many terms are open, the best-scoring ones."""
    kept: Mapping[str, tuple[int, ...]] | None = None
    """Written by `settle`: the parts that are left, by layer (q, k and v are 0, 1 and 2), as LoRA without gates."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def settled(self) -> bool:
        return self.kept is not None

    def modify(self, vit: ViT) -> None:
        lora.refuse_scale(self.rank, self.scale)
        found = list(places(vit, range(vit.depth), self.targets))
        for place in found:
            lora.refuse_rank(place, self.rank)
        if self.kept is None:
            self._refuse(sum(len(place.parts) for place in found))
            for place in found:
                layer = GatedLoRALinear(place, self.rank, self.scale, self.threshold, self.start)
                replace(vit, place.name, layer)
        else:
            for place in _chosen(found, self.kept):
                replace(vit, place.name, LoRALinear(place, self.rank, self.scale))

    def trains(self, name: str, vit: ViT) -> bool:
        return _is_own(name)

    def lr(self, name: str) -> float | None:
        return self.score_lr if name.endswith("lora_score") else None

    def decays(self, name: str) -> bool:
        return not _is_own(name)

    def penalty(self, vit: ViT, progress: Progress) -> Tensor | None:
        layers = _gated(vit)
        if not layers or progress.step == 0 or progress.over(self.warmup) < 1:
            return None
        return self.sparsity * torch.cat([layer.lora_score for layer in layers.values()]).abs().mean()

    @torch.no_grad()
    def after_step(self, vit: ViT, moments: Moments | None, progress: Progress) -> None:
        """Keep to the budget, and what is closed where it is."""
        layers = list(_gated(vit).values())
        if self.top_k is not None and layers and gates.reached(progress, self.warmup):
            scores = torch.cat([layer.lora_score for layer in layers])
            within = budgeted(scores, self.top_k, self.threshold).split([len(layer.parts) for layer in layers])
            for layer, part in zip(layers, within, strict=True):
                layer.lora_score.copy_(part)
        for layer in layers:
            layer.hold(moments or {})

    def health(self, vit: ViT) -> dict[str, float]:
        layers = _gated(vit).values()
        return {"open_blocks": 100 * float(torch.cat([i.open_P for i in layers]).float().mean())} if layers else {}

    @torch.no_grad()
    def settle(self, vit: ViT) -> Selective:
        layers = _gated(vit)
        if not layers:
            return self
        kept = {}
        for name, layer in layers.items():
            left = layer.opened()
            if isinstance(left, LoRALinear):
                kept[name] = left.parts
            replace(vit, name, left)
        if not kept:
            logger.warning("adapt: every gate is closed, so the backbone is the source's; lower adapt.sparsity")
        return self.model_copy(update={"kept": kept})

    def _refuse(self, count: int) -> None:
        """Refuse gates that could not do what they are asked to."""
        if self.start < self.threshold:
            raise ConfigError(
                f"adapt.start: {self.start:g} is below adapt.threshold, {self.threshold:g}, so that every term would "
                "start closed; take a higher start"
            )
        if self.top_k is not None and self.top_k > count:
            raise ConfigError(f"adapt.top_k: {self.top_k} of {count} low-rank terms; use 1 to {count}")


def budgeted(scores: Tensor, count: int, tau: float) -> Tensor:
    """Scores (N,) of which exactly the `count` best reach tau: all are shifted alike until the last of these does."""
    chosen = gates.best(scores, count)
    level = scores.new_tensor(tau)
    shifted = scores + (level - scores[chosen].min())
    # Rounding, and equal scores on both sides, must not decide otherwise.
    below = torch.nextafter(level, level - 1)
    return torch.where(chosen, shifted.clamp(min=level), shifted.clamp(max=below))


def _is_own(name: str) -> bool:
    return lora.is_lora(name) or name.endswith("lora_score")


def _gated(vit: nn.Module) -> dict[str, GatedLoRALinear]:
    return {name: module for name, module in vit.named_modules() if isinstance(module, GatedLoRALinear)}


def _chosen(found: list[Place], kept: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """The places that were kept, with the parts that were.

    Raises:
        ConfigError: the model has no such place, or its parts are none, twice the same or out of order.
    """
    there = {place.name: place for place in found}
    strange = [name for name, parts in kept.items() if name not in there or not _within(parts, there[name].parts)]
    if strange:
        raise ConfigError(f"adapt.kept: no low-rank term has its place at {', '.join(strange[:5])}; leave kept out")
    return [there[name]._replace(parts=parts) for name, parts in kept.items()]


def _within(parts: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether some parts, at least one, are among others, each once and in order."""
    return bool(parts) and parts == tuple(part for part in others if part in parts)
