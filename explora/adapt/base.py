"""The contract of every way to adapt a backbone."""

from __future__ import annotations

import abc

from torch import nn

from explora.config import Config
from explora.errors import ConfigError
from explora.models.vit import ViT


class Method(Config, abc.ABC):
    """How a backbone may change. Subclasses set `name: Literal[...]`, by which a config picks them."""

    def modify(self, vit: ViT) -> None:
        """Change the structure in place; outputs stay what they were."""

    @abc.abstractmethod
    def trains(self, name: str, vit: ViT) -> bool:
        """Whether the parameter of this name learns."""

    def merge(self, vit: ViT) -> None:
        """Bring an adapted model back to the plain architecture, in place, with the same outputs."""

    @property
    def scale(self) -> float | None:
        """alpha / rank for methods that have it."""
        return None


def adapt(vit: ViT, method: Method) -> list[str]:
    """Apply a method: change the structure, freeze everything, let the chosen parameters learn.

    Returns:
        The names of the parameters that learn, in the model's order.

    Raises:
        ConfigError: the method picks a block that the model does not have.
    """
    method.modify(vit)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(method.trains(name, vit))
    return [name for name, parameter in vit.named_parameters() if parameter.requires_grad]


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


def replace(vit: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted place `name`."""
    parent, _, last = name.rpartition(".")
    setattr(vit.get_submodule(parent), last, module)
