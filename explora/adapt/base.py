"""The contract of every way to adapt a backbone."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from explora.adapt import places
from explora.config import Config
from explora.errors import ConfigError
from explora.models.vit import ViT
from explora.schedules import Progress

Moments = Mapping[Any, Mapping[str, Any]]
"""What an optimizer remembers of each parameter."""


class Method(Config, abc.ABC):
    """How a backbone may change. Subclasses make `name` a `Literal`.

    The first four methods are the contract of all; the others are for methods with gates. What they are told of
    progress is that of the backbone's own training, without the steps before in which heads learn alone.
    """

    name: str
    """Picks the method."""
    whole: ClassVar[bool] = False
    """Whether every rank must hold all that learns: such a method runs under ddp, not in shards."""
    reaches_patches: ClassVar[bool] = True
    """Whether patch tokens change, not the class token alone."""

    def modify(self, vit: ViT) -> None:
        """Change the structure in place; outputs stay what they were."""

    @abc.abstractmethod
    def trains(self, name: str, vit: ViT) -> bool:
        """Whether the parameter of this name learns."""

    def merge(self, vit: ViT) -> None:
        """Bring an adapted model back to the plain architecture, in place, with the same outputs."""
        places.merge(vit)

    def strip(self, vit: ViT) -> None:
        """Take off again what `modify` put on, in place; parameters that were there before stay the same objects."""
        places.strip(vit)

    @property
    def scale(self) -> float | None:
        """Factor on the low-rank terms, for methods that have it."""
        return None

    def lr(self, name: str) -> float | None:
        """The peak rate of a parameter that must have one of its own, whatever `optim` does to the others' rates.

        Neither `lr_rule` nor `layer_decay` acts on it; a rule of `optim.rules` that matches goes before it.
        """
        return None

    def decays(self, name: str) -> bool:
        """Whether weight decay may act on a parameter."""
        return True

    def penalty(self, vit: ViT, progress: Progress) -> Tensor | None:
        """What is added to the loss of each step beside the objective's, a scalar."""
        return None

    def after_step(self, vit: ViT, moments: Moments | None, progress: Progress) -> None:
        """What follows an optimizer step on the backbone; on its EMA teacher as well, which has no moments."""

    def health(self, vit: ViT) -> dict[str, float]:
        """Numbers for the log."""
        return {}

    @property
    def settled(self) -> bool:
        """Whether `settle` wrote this method, in its field `kept`: it describes a result, and trains nothing."""
        return False

    def settle(self, vit: ViT) -> Method:
        """Drop in place what training has closed, with the same outputs; returns the method that describes the rest."""
        return self


def adapt(vit: ViT, method: Method) -> list[str]:
    """Apply a method: change the structure, freeze everything, let the chosen parameters learn.

    Returns:
        The names of the parameters that learn, in the model's order.

    Raises:
        ConfigError: the method does not fit the model, or is what an earlier training has left.
    """
    if method.settled:
        raise ConfigError("adapt.kept: is written by a training that has ended, of what it has left; leave it out")
    method.modify(vit)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(method.trains(name, vit))
    return [name for name, parameter in vit.named_parameters() if parameter.requires_grad]


def snapshot(vit: ViT) -> dict[str, Tensor]:
    """Copies of all that learns, by name."""
    return {name: p.detach().clone() for name, p in vit.named_parameters() if p.requires_grad}


@torch.no_grad()
def restore(vit: ViT, values: Mapping[str, Tensor]) -> None:
    """Put values back that `snapshot` took."""
    for name, value in values.items():
        vit.get_parameter(name).copy_(value)


@torch.no_grad()
def unplug(vit: ViT, method: Method, start: Mapping[str, Tensor] | None = None) -> None:
    """Take a method off again, in place, after any training: the source model, bit for bit.

    Args:
        start: what `snapshot` gave before training, for methods that train the source's own parameters.

    Raises:
        ConfigError: such a method, and nobody kept the source's values; the model is stripped by then.
    """
    kept = {id(vit.get_parameter(name)): value for name, value in (start or {}).items()}
    method.strip(vit)
    for name, parameter in vit.named_parameters():
        if parameter.requires_grad:
            if id(parameter) not in kept:
                raise ConfigError(
                    f"adapt: '{method.name}' has trained {name} itself; give unplug what "
                    "explora.adapt.snapshot gave before training, or load the source weights again"
                )
            parameter.copy_(kept[id(parameter)])


def resolve_blocks(blocks: tuple[int, ...], depth: int) -> frozenset[int]:
    """Indices into `depth` blocks, negative ones counted from the end.

    Raises:
        ConfigError: an index outside the model.
    """
    wrong = [index for index in blocks if not -depth <= index < depth]
    if wrong:
        raise ConfigError(f"adapt.blocks: {wrong} outside a model of {depth} blocks; use {-depth} to {depth - 1}")
    return frozenset(index % depth for index in blocks)


def block_of(name: str) -> int | None:
    """The block that a parameter belongs to, from its name; None outside the blocks."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def is_norm(name: str) -> bool:
    """Whether a parameter belongs to a LayerNorm (`norm1`, `norm2`, `norm`, `q_norm`, ...)."""
    return any("norm" in part for part in name.split("."))
