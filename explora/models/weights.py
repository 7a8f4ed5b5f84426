"""A config's weights to a filled ViT: format and architecture are inferred, every tensor is accounted for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, field_validator
from torch import Tensor

from explora.config import Config
from explora.errors import ConfigError, WeightsError
from explora.models import formats
from explora.models.account import Account, check_finite, fill
from explora.models.extensions import extend
from explora.models.files import METADATA_KEY, fingerprint, read_file, read_tensors
from explora.models.formats import Architecture, Checkpoint, Source
from explora.models.formats.checkpoint import Bands, Groups, Value, canonical_bands
from explora.models.inflate import Fitted, fit_bands
from explora.models.vit import ViT, build, timm

__all__ = [
    "METADATA_KEY",
    "Account",
    "Loaded",
    "ModelConfig",
    "Source",
    "fill",
    "fingerprint",
    "load_backbone",
    "load_model",
    "read_tensors",
]


class ModelConfig(Config):
    """The backbone to start from."""

    name: str | None = None
    """timm's name of the architecture, such as deit_tiny_patch16_224; null infers it from the weights."""
    options: dict[str, int | float | bool | str] = Field(default_factory=dict)
    """timm arguments that change the architecture, such as {depth: 6, patch_size: 8}; our own exports carry them."""
    weights: str | None = None
    """A .safetensors or .pth file, a Hugging Face folder, `timm` (timm downloads its own) or null (random weights)."""
    image_size: int | None = Field(None, ge=8)
    """Side of the square images in pixels; null takes the size that the weights or the architecture were made for."""
    positions: Literal["auto", "official", "timm"] = "auto"
    """How positions are resampled to other sizes: as DINOv2's own code, as timm, or (auto) as the weights were used."""
    channel_groups: Groups | None = None
    """SatMAE's channel groups, such as [[0, 1, 2, 6], [3, 4, 5, 7], [8, 9]]; null embeds all channels at once."""
    bands: Bands | None = None
    """Bands of the input channels in order, by any name in use; null: what the weights say, or red, green, blue for
    three channels."""

    _canonical = field_validator("bands")(canonical_bands)


class Loaded(NamedTuple):
    """A backbone and what came with it."""

    vit: ViT
    account: Account | None
    """None for random weights."""
    decoder: dict[str, Tensor]
    """An MAE decoder under official names (its mask token as `decoder_mask_token`), {} where the weights have none."""
    decoder_heads: int | None = None
    """Attention heads of that decoder, where the file says."""


def load_model(config: ModelConfig) -> Loaded:
    """Build the backbone that a config describes and fill it, on the CPU.

    Raises:
        WeightsError: unknown architecture, unreadable file, or a file that fits the model only in part.
    """
    if config.weights is None:
        return Loaded(_build(config, Architecture(None)), None, {})
    timms = config.weights == "timm"
    checkpoint = _timm(config.name) if timms else formats.read(read_file(config.weights))
    shaped, embed = checkpoint.architecture, checkpoint.tensors.get("channel_embed")
    if embed is not None and not (config.channel_groups or shaped.channel_groups):
        raise WeightsError("model.channel_groups is needed: the weights hold only how many channels each group has")
    if embed is None and shaped.channel_groups:
        raise WeightsError(f"{config.weights}: says channel groups {shaped.channel_groups}, but has no channel_embed")
    vit = _build(config, shaped, None if embed is None else embed.shape[-1])
    _extend(vit, shaped, str(config.weights))
    name = str(config.name if timms else config.weights)
    fitted = fit_bands(vit, checkpoint, config.bands, name)
    fresh, notes = _fresh(vit, checkpoint, fitted), _notes(config, checkpoint, vit, fitted)
    account = fill(vit, fitted.tensors, name, ignored=checkpoint.ignored, fresh=fresh, notes=notes)
    own = Source(checkpoint.format, Path(name).name, checkpoint.licence, checkpoint.inferred)
    vit.source = checkpoint.source or own
    check_finite(checkpoint.decoder, name)
    return Loaded(vit, account, fitted.decoder, checkpoint.decoder_heads)


def load_backbone(path: str | Path, *, name: str | None = None, image_size: int | None = None) -> ViT:
    """Load a backbone from a file or a Hugging Face folder; `name` is timm's, where shapes do not tell it.

    Raises:
        WeightsError: see `load_model`.
    """
    return load_model(ModelConfig(name=name, weights=str(path), image_size=image_size)).vit


def _timm(name: str | None) -> Checkpoint:
    if name is None:
        raise WeightsError("model.weights is 'timm', but model.name is not given")
    try:
        tensors = dict(timm.create_model(name, pretrained=True).state_dict())
    except (RuntimeError, OSError) as error:
        raise WeightsError(f"timm could not fetch the weights of '{name}': {error}") from None
    registered = timm.get_pretrained_cfg(name, allow_unregistered=True)
    licence = str(registered.license or formats.UNKNOWN) if registered is not None else formats.UNKNOWN
    return Checkpoint("timm", Architecture(name), tensors, licence=licence)


def _notes(config: ModelConfig, checkpoint: Checkpoint, vit: ViT, fitted: Fitted) -> list[str]:
    """What was found beside the tensors, and everything that was assumed and that the config does not say."""
    shaped, notes = checkpoint.architecture, [*checkpoint.notes, *fitted.notes]
    if not config.name:
        notes += shaped.guesses
    notes += [f"with {' and '.join(vit.additions)}, which no merging takes away"] if vit.additions else []
    if shaped.channel_groups and not (shaped.recorded or config.channel_groups):
        groups = [list(group) for group in shaped.channel_groups]
        notes.append(f"channel groups taken as SatMAE's {groups}, unless model.channel_groups says others")
    if shaped.mean is not None and not fitted.known:
        notes.append(
            f"mean and std are given for {len(shaped.mean)} channels, but the model has {vit.channels} others: "
            f"{vit.mean} and {vit.std} are taken"
        )
    if vit.channels == 3 and fitted.known and not (config.name or shaped.sure_of_mean):
        notes.append(
            f"the weights do not say which mean and std their images had; those of timm's {vit.name} are taken unless "
            "model.name says another"
        )
    notes += [f"decoder: {len(checkpoint.decoder)} tensors"] if checkpoint.decoder else []
    return notes


def _build(config: ModelConfig, inferred: Architecture, channel_width: int | None = None) -> ViT:
    """What the config says goes before what the weights tell."""
    name = config.name or inferred.name
    if name is None:
        raise WeightsError(
            "model.name is needed: "
            + ("there are no weights to infer it from" if config.weights is None else "the weights do not tell it")
        )
    renamed = config.name is not None and not inferred.recorded
    options = {**({} if renamed else inferred.options), **config.options}
    size = config.image_size or inferred.image_size or _native_size(name)
    positions = inferred.positions if config.positions == "auto" else config.positions
    groups = config.channel_groups or inferred.channel_groups
    if inferred.recorded and inferred.channel_groups not in (None, groups):
        raise WeightsError(f"model.channel_groups is {groups}, but {config.weights} says {inferred.channel_groups}")
    bands = _set_channels(options, config, groups, inferred.bands)
    try:
        return build(
            name,
            size,
            options,
            positions=positions,
            channel_groups=groups,
            channel_width=channel_width,
            bands=bands,
        )
    except WeightsError as error:
        if renamed and size == inferred.image_size != config.image_size:
            raise WeightsError(f"{config.weights}, for images of {size} px, does not fit {name}: {error}") from None
        raise


def _extend(vit: ViT, inferred: Architecture, file: str) -> None:
    """Put on what the weights were trained with and no merging takes away."""
    try:
        for name, settings in inferred.additions.items():
            extend(vit, name, settings)
    except ConfigError as error:
        raise WeightsError(f"{file}: damaged metadata, or of a newer explora: {error}") from None
    vit.inherited = frozenset(vit.additions)


def _set_channels(
    options: dict[str, Value], config: ModelConfig, groups: Groups | None, recorded: Bands | None
) -> Bands | None:
    """Put the number of channels that bands or groups ask for into `options`; returns the bands, None where unknown.

    Raises:
        WeightsError: what the config says of channels contradicts itself.
    """
    grouped = None if groups is None else sum(len(group) for group in groups)
    if config.bands is None:
        if grouped is not None:
            options.setdefault("in_chans", grouped)
        return recorded if recorded is not None and len(recorded) == options.get("in_chans", 3) else None
    count = len(config.bands)
    for what, channels in (
        ("model.options.in_chans says", config.options.get("in_chans")),
        ("the channel groups have", grouped),
    ):
        if channels not in (None, count):
            raise WeightsError(f"model.bands names {count} bands, but {what} {channels} channels; they must agree")
    if options.get("in_chans", 3) != count:
        options["in_chans"] = count
    return config.bands


def _fresh(vit: ViT, checkpoint: Checkpoint, fitted: Fitted) -> tuple[str, ...]:
    """Embeddings that a model with channel groups cannot take from weights without them."""
    if vit.channel_groups is None or "channel_embed" in checkpoint.tensors:
        return ()
    anew = ("channel_embed", "pos_embed", "patch_embed")
    names = (*vit.state_dict(), *fitted.tensors)
    return tuple(name for name in names if name.partition(".")[0] in anew and name not in fitted.made)


def _native_size(name: str) -> int:
    registered = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return registered.input_size[-1] if registered is not None else 224
