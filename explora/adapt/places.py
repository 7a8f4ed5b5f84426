"""Where in a ViT the linear maps are that methods act on, under the short names of configs."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn

from explora.errors import ConfigError
from explora.models.additions import Addition

Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
_MODULES: dict[str, tuple[str, ...]] = {
    "proj": ("attn.proj",),
    "fc1": ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x"),  # a SwiGLU may keep its gate apart
    "fc2": ("mlp.fc2",),
}


class Place(NamedTuple):
    """A linear layer, and which equal parts of its output are meant."""

    name: str
    base: nn.Linear
    parts: tuple[int, ...]
    """Numbers of these parts: 0, 1 and 2 are q, k and v of a fused layer."""
    pieces: int
    """How many parts the output has."""

    @property
    def width(self) -> int:
        """Outputs of one part."""
        return self.base.out_features // self.pieces


def places(model: nn.Module, blocks: Iterable[int], targets: Iterable[Target], key: str = "adapt") -> Iterator[Place]:
    """The layers behind some targets in some blocks, block by block.

    Args:
        model: a ViT, or any module with timm's blocks as `blocks.N`, such as the decoder of a MAE.
        key: where the settings stand in a config, for the messages.

    Raises:
        ConfigError: a block lacks a target.
    """
    asked = set(targets)
    parts = tuple(number for number, letter in enumerate("qkv") if letter in asked)
    wanted: list[tuple[tuple[str, ...], tuple[int, ...], int]] = [(("attn.qkv",), parts, 3)] if parts else []
    wanted += [(modules, (0,), 1) for target, modules in _MODULES.items() if target in asked]
    for index in sorted(blocks):
        for names, chosen, pieces in wanted:
            for name, base in _linears(model, f"blocks.{index}", names, key).items():
                yield Place(name, base, chosen, pieces)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted place `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class Adopted(nn.Linear, Addition, abc.ABC):
    """A linear layer that took over another's `weight` and `bias`, so that their names stay; others join them."""

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)  # a linear layer's own would allocate a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias

    @abc.abstractmethod
    def merged(self) -> nn.Linear:
        """A plain layer with the same outputs."""


def merge(model: nn.Module) -> None:
    """Fold what methods put into linear layers into plain ones with the same outputs, in place."""
    for name, layer in _adopted(model):
        replace(model, name, layer.merged())


def strip(model: nn.Module) -> None:
    """Put the layers back that others took over, in place, with the very parameters."""
    for name, layer in _adopted(model):
        replace(model, name, plain(layer))


def _adopted(model: nn.Module) -> list[tuple[str, Adopted]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Adopted)]


def plain(layer: nn.Linear, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> nn.Linear:
    """A plain linear layer with the very parameters of `layer`, or with other values in their place."""
    with torch.device("meta"):
        bare = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    bare.weight, bare.bias = _kept(layer.weight, weight), _kept(layer.bias, bias)
    return bare


def _kept(parameter: Any, value: torch.Tensor | None) -> Any:
    if value is None or parameter is None:
        return parameter
    return nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)


def _linears(model: nn.Module, block: str, names: tuple[str, ...], key: str) -> dict[str, nn.Linear]:
    inside = dict(model.get_submodule(block).named_modules())
    found = {f"{block}.{name}": inside[name] for name in names if isinstance(inside.get(name), nn.Linear)}
    if not found:
        raise ConfigError(f"{key}.targets: {block} has no linear map {' or '.join(names)}; leave this target out")
    return cast(dict[str, nn.Linear], found)
