"""Diff pruning (Guo, Rush, Kim 2021): a change of half a per cent of the weights, and gates that learn of which."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from explora.adapt import gates
from explora.adapt.base import Method, Moments
from explora.adapt.places import Adopted, Place, Target, places, plain, replace
from explora.errors import ConfigError, WeightsError
from explora.models.vit import ViT
from explora.schedules import Length, LengthField, Progress

FIXED = 1e6
"""+-alpha of gates that are fixed: so far out that an EMA teacher's gates follow with the first share they get."""


class ChangedLinear(Adopted):
    """A linear layer whose frozen weight gets a change before each product."""

    @abc.abstractmethod
    def changed(self) -> Tensor:
        """The weight that counts, (out, in)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.changed(), self.bias)

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            return plain(self.eval(), self.changed())


class DiffLinear(ChangedLinear):
    """weight + z w in equal parts of the output: `diff_w` and the gates' `diff_alpha`, (parts, out / pieces, in)."""

    added = ("diff_w", "diff_alpha")

    def __init__(self, place: Place, alpha: float) -> None:
        super().__init__(place.base)
        self.parts, self.pieces = place.parts, place.pieces
        shape = len(place.parts), place.width, self.in_features
        like: Any = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.diff_w = nn.Parameter(torch.zeros(shape, **like))
        self.diff_alpha = nn.Parameter(torch.full(shape, alpha, **like))
        self.train(place.base.training)  # it decides whether gates are drawn

    def change(self, *, sample: bool = False) -> Tensor:
        """z w, (parts, width, in)."""
        return gates.hard_concrete(self.diff_alpha, sample=sample) * self.diff_w

    def changed(self) -> Tensor:
        return self.weight + self.spread(self.change(sample=self.training))

    def spread(self, change_PWI: Tensor) -> Tensor:
        """Parts at their places in the whole weight (out, in), with zeros elsewhere."""
        nothing = torch.zeros_like(change_PWI[0])
        pieces = range(self.pieces)
        return torch.cat([change_PWI[self.parts.index(i)] if i in self.parts else nothing for i in pieces])

    def fix(self, open_PWI: Tensor, moments: Moments) -> None:
        """From here on exactly these gates are open, wholly, and their w alone learn; the change itself stays."""
        self.diff_w.copy_(self.change())
        self.diff_alpha.copy_(torch.where(open_PWI, FIXED, -FIXED))
        gates.forget(self.diff_w, ~open_PWI, moments)
        gates.forget(self.diff_alpha, torch.ones_like(open_PWI), moments)


class SparseLinear(ChangedLinear):
    """weight + `diff_values` (count,) at the flat `diff_places` (count,) of it: what is left of a DiffLinear."""

    added = ("diff_values", "diff_places")

    def __init__(self, base: nn.Linear, count: int) -> None:
        super().__init__(base)
        self.diff_values = nn.Parameter(self.weight.new_zeros(count))
        self.diff_places = nn.Buffer(torch.zeros(count, dtype=torch.int32, device=self.weight.device))

    def fits(self) -> bool:
        """Whether all places are in the weight, each once and in order."""
        ends = self.diff_places.new_tensor([-1]), self.diff_places.new_tensor([self.weight.numel()])
        return bool((torch.cat([ends[0], self.diff_places, ends[1]]).long().diff() > 0).all())

    def changed(self) -> Tensor:
        return self.weight.flatten().index_add(0, self.diff_places, self.diff_values).view_as(self.weight)


class DiffPruning(Method):
    """Train w and gates z in theta + z w for every weight; keep the largest z w, and train these alone to the end.

    Source: arXiv 2012.07463, its unstructured variant; default values are the released code's. `optim.lr` is the rate
    of w, 1e-5 there, then 5e-5 for what is kept.

    In training z is drawn anew for each forward pass, as drop path is: every rank draws its own. The teacher and
    whatever is saved take its deterministic value. In training it needs three times the memory of the weights that
    it changes, nine with gradients and AdamW's moments; what is stored is values and places of `keep` of them.
    """

    whole = True

    name: Literal["diff_pruning"] = "diff_pruning"
    """Picks this method."""
    targets: tuple[Target, ...] = Field(get_args(Target), min_length=1)
    """Linear maps whose weights change: q, k, v, proj (attention), fc1, fc2 (MLP)."""
    keep: float = Field(0.005, gt=0, le=1)
    """Share of these weights that may differ from the source's in the end."""
    project: LengthField = Length(50, "%")
    """When that choice is made, at the latest after the last step; a backbone that is saved before is cut down too."""
    sparsity: float = Field(1.25e-7, ge=0)
    """Weight of the expected number of open gates in the loss."""
    start: float = 5.0
    """Alpha of every gate at the start: 5 leaves 99.3 % open."""
    alpha_lr: float = Field(0.1, gt=0)
    """Peak learning rate of alpha."""
    kept: Mapping[str, int] | None = None
    """Written by `settle`: how many weights differ, by layer."""

    @property
    def settled(self) -> bool:
        return self.kept is not None

    def modify(self, vit: ViT) -> None:
        found = list(places(vit, range(vit.depth), self.targets))
        if self.kept is not None:
            _sparse(vit, {place.name: place for place in found}, self.kept)
            return
        for place in found:
            replace(vit, place.name, DiffLinear(place, self.start))
        self._refuse_nothing(vit)

    def trains(self, name: str, vit: ViT) -> bool:
        return _is_own(name)

    def merge(self, vit: ViT) -> None:
        for name, layer in vit.named_modules():
            if isinstance(layer, SparseLinear) and not layer.fits():
                raise WeightsError(
                    f"{name}.diff_places are not places of its weight, each once and in order; this adapter file is "
                    "damaged: take another copy of it, or train again"
                )
        super().merge(vit)

    def lr(self, name: str) -> float | None:
        return self.alpha_lr if name.endswith("diff_alpha") else None

    def decays(self, name: str) -> bool:
        return not _is_own(name)

    def penalty(self, vit: ViT, progress: Progress) -> Tensor | None:
        layers = _gated(vit).values()
        counts = [gates.expected_open(layer.diff_alpha).sum() for layer in layers]
        return self.sparsity * torch.stack(counts).sum() if counts else None

    @torch.no_grad()
    def after_step(self, vit: ViT, moments: Moments | None, progress: Progress) -> None:
        """Choose what is kept when that is due. A teacher waits: the student's choice reaches it through its EMA."""
        layers = list(_gated(vit).values())
        due = gates.reached(progress, gates.END if moments is None else self.project)
        if layers and due and not _fixed(layers[0]):
            for layer, chosen in zip(layers, self._chosen(layers), strict=True):
                layer.fix(chosen, moments or {})

    @torch.no_grad()
    def health(self, vit: ViT) -> dict[str, float]:
        layers = _gated(vit).values()
        if not layers:
            return {}
        count = sum(float(gates.expected_open(layer.diff_alpha).sum()) for layer in layers)
        return {"open_weights": 100 * count / sum(layer.diff_w.numel() for layer in layers)}

    @torch.no_grad()
    def settle(self, vit: ViT) -> DiffPruning:
        layers = _gated(vit)
        if not layers:
            return self
        kept = {}
        for (name, layer), chosen in zip(layers.items(), self._chosen(list(layers.values())), strict=True):
            places_N = layer.spread(chosen).flatten().nonzero().squeeze(1)
            left = SparseLinear(layer, len(places_N))
            left.diff_places.copy_(places_N)
            left.diff_values.copy_(layer.spread(layer.change()).flatten()[places_N])
            replace(vit, name, left if len(places_N) else plain(layer))
            if len(places_N):
                kept[name] = len(places_N)
        return self.model_copy(update={"kept": kept})

    def _chosen(self, layers: list[DiffLinear]) -> list[Tensor]:
        """Which weights of each layer are among the `keep` whose change is the largest of all layers'."""
        sizes = [layer.diff_w.numel() for layer in layers]
        changes = torch.cat([layer.change().abs().flatten() for layer in layers])
        chosen = gates.best(changes, math.floor(self.keep * sum(sizes))).split(sizes)
        return [part.view_as(layer.diff_w) for part, layer in zip(chosen, layers, strict=True)]

    def _refuse_nothing(self, vit: ViT) -> None:
        count = sum(layer.diff_w.numel() for layer in _gated(vit).values())
        if self.keep * count < 1:
            raise ConfigError(f"adapt.keep: {self.keep:g} of {count} weights is none; take more than {1 / count:.2g}")


def _is_own(name: str) -> bool:
    return name.rpartition(".")[2].startswith("diff_")


def _gated(vit: nn.Module) -> dict[str, DiffLinear]:
    return {name: module for name, module in vit.named_modules() if isinstance(module, DiffLinear)}


def _fixed(layer: DiffLinear) -> bool:
    """Whether its gates are open or closed for good; learning alone never takes alpha as far."""
    return bool(layer.diff_alpha.abs().min() > FIXED / 1000)


def _sparse(vit: ViT, there: Mapping[str, Place], kept: Mapping[str, int]) -> None:
    """Make room for what `settle` kept.

    Raises:
        ConfigError: the model has no such place, or not so many weights there.
    """
    for name, count in kept.items():
        if name not in there or not 0 < count <= there[name].base.weight.numel():
            raise ConfigError(f"adapt.kept: {name} has no room for {count} changed weights; leave kept out")
        replace(vit, name, SparseLinear(there[name].base, count))
