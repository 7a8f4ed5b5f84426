"""What every reader hands over: tensors under our names, and the architecture that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from pydantic import Field
from torch import Tensor

from explora.bands import Scaling, canonical
from explora.errors import WeightsError
from explora.models.positions import PositionMode

Tensors = Mapping[str, Tensor]
Scale = tuple[float, ...]
Groups = Annotated[tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...], Field(min_length=1)]
"""Channel groups as a user or a file gives them: no empty ones."""


Bands = Annotated[tuple[str, ...], Field(min_length=1)]
"""Bands of the channels in order; see `canonical_bands`."""
Value = int | float | bool | str
UNKNOWN = "unknown; see where the file came from"


@dataclass(frozen=True)
class Source:
    """Where the weights of a model came from."""

    format: str
    """dinov2, mae, timm, huggingface/dinov2, dinov3, explora-release, ..."""
    file: str
    """The file's or folder's name, without its place."""
    licence: str
    inferred: bool = False
    """Whether the licence is the one that the publisher of such weights gives, and the file itself says none."""


@dataclass(frozen=True)
class Architecture:
    """What `build` needs to make the model that a checkpoint belongs to."""

    name: str | None
    """timm's name; None where shapes alone do not tell it."""
    image_size: int | None = None
    """Side in pixels of the images that its position embedding was made for; None: the architecture's own."""
    options: Mapping[str, Value] = field(default_factory=dict)
    positions: PositionMode = "timm"
    channel_groups: Groups | None = None
    mean: Scale | None = None
    """Channel mean of images in [0, 1] that the weights expect; None: the architecture's own."""
    std: Scale | None = None
    """Their standard deviation; given wherever the mean is."""
    bands: Bands | None = None
    """Bands of the channels in order; None where nobody says."""
    scaling: Scaling | None = None
    """Which values were 0 and 1 before mean and std; None: display levels, or nobody says."""
    additions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of the extensions that are on it, by name; see `explora.models.extensions`."""
    recorded: bool = False
    """Whether the file itself says so, and nothing was inferred."""
    sure_of_mean: bool = True
    """Whether mean and std are given, or the same for all published weights of these names and shapes."""
    guesses: tuple[str, ...] = ()
    """What else was assumed, as sentences; `model.name` and `model.options` would say it."""


@dataclass(frozen=True)
class Checkpoint:
    """A file's content after its format was understood."""

    format: str
    architecture: Architecture
    tensors: dict[str, Tensor]
    """Under our names."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    """An MAE decoder under official names; its mask token is `decoder_mask_token`."""
    decoder_heads: int | None = None
    """Its attention heads, where the file says."""
    ignored: tuple[str, ...] = ()
    """Tensors of the file that this format has and a backbone has no use for."""
    licence: str = UNKNOWN
    inferred: bool = False
    """See `Source`."""
    notes: tuple[str, ...] = ()
    """What a user of these weights should know."""
    source: Source | None = None
    """What our own metadata says; None: the format, the file and the licence above."""


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

    def heads(self, width: int) -> int | None:
        """What published models of a width have; None where none is known."""
        return next((one.heads for one in self.known if one.width == width), _HEADS.get(width))


_HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16, 4096: 32}
"""By width, for families that have no member of it; So400m, H, g, DINOv2's g, G and DINOv3's 7B. Others: width / 64."""

POOLED = "fc_norm, trained on the mean of the patch tokens, stands here as the final norm of every token"


def pooled(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`fc_norm` as `norm` where a classifier of mean tokens has only the former, and the note that says so."""
    if "fc_norm.weight" not in tensors or "norm.weight" in tensors:
        return tensors, ()
    return {re.sub(r"^fc_norm\.", "norm.", name): tensor for name, tensor in tensors.items()}, (POOLED,)


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
        heads: attention heads where the file says them; otherwise those of a known size, or a guess by the width.

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
    guesses: tuple[str, ...] = ()
    if heads is None and all((one.width, one.depth) != (width, depth) for one in family.known):
        usual = family.heads(width)
        rule = f"{usual}, as in published models of width {width}" if usual else "width / 64"
        guesses = (f"heads taken as {rule}, unless model.options.num_heads says another number",)
    heads = heads or family.heads(width) or (width // 64 if width % 64 == 0 else None)
    if heads is None or known.swiglu != swiglu:
        return Architecture(None, size, positions=positions)
    options = _options(known, asked._replace(heads=heads), family, channels)
    return Architecture(known.name, size, options, positions, guesses=guesses)


def canonical_bands(bands: Bands | None) -> Bands | None:
    """Canonical names of bands that a user or a file names.

    Raises:
        ValueError: two are the same; for validators of configs.
    """
    names = tuple(map(canonical, bands or ()))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"band {', '.join(twice)} is named more than once")
    return names or None


def channels_of(tensors: Tensors) -> int:
    """Channels of the images that a patch embedding takes, those of all groups together; 0 where there is none."""
    names = (name for name in tensors if re.fullmatch(r"patch_embed\.(\d+\.)?proj\.weight", name))
    return sum(tensors[name].shape[1] for name in names if tensors[name].dim() == 4)


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
    if asked.layer_scale and not known.layer_scale:
        options["init_values"] = 1e-5
    if channels != 3:
        options["in_chans"] = channels
    return options


def _ratio(asked: Known) -> float:
    """The ratio from which timm's `int(width * ratio)` gives exactly the hidden width."""
    ratio = asked.hidden / asked.width
    return ratio if int(asked.width * ratio) == asked.hidden else (asked.hidden + 0.5) / asked.width


def scale(config: Mapping[str, Any], *keys: str) -> tuple[Scale | None, Scale | None]:
    """Mean and std of a config, (None, None) where it has none.

    Args:
        keys: what it calls the two.

    Raises:
        WeightsError: they are no positive numbers, one for each channel.
    """
    found = [config.get(key) for key in keys]
    if found == [None, None]:
        return None, None
    numbers = all(
        isinstance(one, list | tuple) and all(isinstance(value, int | float) for value in one) for one in found
    )
    if not numbers or len(found[0] or ()) != len(found[1] or ()) or min(found[1] or (0,)) <= 0:
        raise WeightsError(
            f"{' and '.join(keys)} are {found[0]!r} and {found[1]!r}, expected a number for each channel"
        )
    mean, std = (tuple(float(value) for value in one or ()) for one in found)
    return mean, std


def setting(config: Mapping[str, Any], key: str, kind: type[Any]) -> Any:
    """A value of a config.json.

    Raises:
        WeightsError: the key is missing or of another type.
    """
    value = config.get(key)
    if not isinstance(value, kind):
        raise WeightsError(f"config.json: '{key}' is {value!r}, expected {kind.__name__}")
    return value
