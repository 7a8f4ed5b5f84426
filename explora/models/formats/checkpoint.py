"""What every reader hands over: tensors under our names, and the architecture that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from explora.errors import WeightsError

Tensors = Mapping[str, Tensor]
PositionMode = Literal["timm", "official"]
Value = int | float | bool | str
UNKNOWN = "unknown; see where the file came from"


@dataclass(frozen=True)
class Architecture:
    """What `build` needs to make the model that a checkpoint belongs to."""

    name: str | None
    """timm's name; None where shapes alone do not tell it."""
    image_size: int | None = None
    """Side in pixels of the images that its position embedding was made for; None: the architecture's own."""
    options: Mapping[str, Value] = field(default_factory=dict)
    positions: PositionMode = "timm"
    channel_groups: tuple[tuple[int, ...], ...] | None = None
    recorded: bool = False
    """Whether the file itself says so, and nothing was inferred."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's content after its format was understood."""

    format: str
    architecture: Architecture
    tensors: dict[str, Tensor]
    """Under our names."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """An MAE decoder under official names; its mask token is `decoder_mask_token`."""
    ignored: tuple[str, ...] = ()
    """Tensors of the file that this format has and a backbone has no use for."""
    licence: str = UNKNOWN
    notes: tuple[str, ...] = ()
    """What a user of these weights should know."""
    guesses: tuple[str, ...] = ()
    """What was assumed that `model.name` would say."""


class Known(NamedTuple):
    """An architecture that timm names."""

    name: str
    width: int
    depth: int
    heads: int
    hidden: int
    """Rows of `mlp.fc1` (of one of both where a SwiGLU keeps them apart)."""
    patch: int
    registers: int = 0
    swiglu: bool = False
    layer_scale: bool = True
    qkv_bias: bool = True


class Family(NamedTuple):
    """Architectures of one kind; the first one, with options, stands for sizes that timm does not name."""

    known: Sequence[Known]
    registers: str = "reg_tokens"
    """timm's name for the number of registers."""


def shape(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that every backbone has.

    Raises:
        WeightsError: it is not there or has another number of dimensions.
    """
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != dims:
        said = "is not there" if tensor is None else f"is {tuple(tensor.shape)}"
        raise WeightsError(f"these weights are no vision transformer that explora reads: {name} {said}")
    return tuple(tensor.shape)


def architecture(
    tensors: Tensors,
    family: Family,
    *,
    heads: int | None = None,
    positions: PositionMode = "timm",
) -> Architecture:
    """The timm name and the options that differ from it, by names and shapes.

    Args:
        tensors: under our names.
        heads: attention heads where the file says them; otherwise those of a known size, or width / 64.

    Raises:
        WeightsError: the names are not those of a vision transformer.
    """
    width, channels, patch, _ = shape(tensors, "patch_embed.proj.weight", 4)
    depth = 1 + max((int(i) for name in tensors for i in re.findall(r"^blocks\.(\d+)\.", name)), default=-1)
    apart = "blocks.0.mlp.fc1_g.weight" in tensors
    hidden = shape(tensors, f"blocks.0.mlp.fc1{'_g' * apart}.weight", 2)[0]
    swiglu = apart or hidden == 2 * shape(tensors, "blocks.0.mlp.fc2.weight", 2)[1]
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    qkv_bias = bool({"blocks.0.attn.qkv.bias", "blocks.0.attn.q_bias"} & tensors.keys())
    scaled = bool({"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & tensors.keys())
    asked = Known("", width, depth, 0, hidden, patch, registers, swiglu, scaled, qkv_bias)
    known = min(family.known, key=lambda one: _distance(one, asked))
    size = image_size(tensors, patch)
    same_size = (known.width, known.depth) == (width, depth)
    heads = heads or (known.heads if same_size else width // 64 if width % 64 == 0 else None)
    if heads is None:
        return Architecture(None, size, positions=positions)
    return Architecture(known.name, size, _options(known, asked._replace(heads=heads), family, channels), positions)


def image_size(tensors: Tensors, patch: int) -> int | None:
    """Side in pixels of the square grid in `pos_embed`, None where there is none."""
    rows = tensors["pos_embed"].shape[1] if "pos_embed" in tensors and tensors["pos_embed"].dim() == 3 else 0
    for prefix in (1, 0):
        side = round(max(0, rows - prefix) ** 0.5)
        if side and side * side == rows - prefix:
            return side * patch
    return None


def rename(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace parts of names that stand between dots or at either end."""
    parts = re.compile(r"(?<![^.])(" + "|".join(map(re.escape, names)) + r")(?![^.])")
    return {parts.sub(lambda found: names[found[1]], name): tensor for name, tensor in tensors.items()}


def _distance(known: Known, asked: Known) -> tuple[bool, ...]:
    """Small where fewer and lighter options are needed; `min` keeps the family's order among equals."""
    return (
        known.swiglu != asked.swiglu,
        bool(known.registers) != bool(asked.registers),
        (known.width, known.depth) != (asked.width, asked.depth),
        known.qkv_bias != asked.qkv_bias,
        known.patch != asked.patch,
    )


def _options(known: Known, asked: Known, family: Family, channels: int) -> dict[str, Value]:
    options: dict[str, Value] = {}
    for name, key in {
        "patch": "patch_size",
        "width": "embed_dim",
        "depth": "depth",
        "heads": "num_heads",
        "registers": family.registers,
        "qkv_bias": "qkv_bias",
    }.items():
        if getattr(known, name) != getattr(asked, name):
            options[key] = getattr(asked, name)
    if known.hidden * asked.width != asked.hidden * known.width:
        options["mlp_ratio"] = _ratio(asked)
    if known.swiglu != asked.swiglu:
        options |= {"swiglu_mlp": asked.swiglu, "swiglu_align_to": 8}
    if asked.layer_scale and not known.layer_scale:
        options["init_values"] = 1e-5
    if channels != 3:
        options["in_chans"] = channels
    return options


def _ratio(asked: Known) -> float:
    """The ratio from which timm's `int(width * ratio)` gives exactly the hidden width."""
    ratio = asked.hidden / asked.width
    return ratio if int(asked.width * ratio) == asked.hidden else (asked.hidden + 0.5) / asked.width


def setting(config: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    """A value of a config.json.

    Raises:
        WeightsError: the key is missing or of another type.
    """
    value = config.get(key)
    if not isinstance(value, kind):
        raise WeightsError(f"config.json: '{key}' is {value!r}, expected {kind.__name__}")
    return value
