"""What our own files say of themselves: in safetensors metadata, in config.json, or in explora.json beside a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator, model_validator

from explora.bands import Scaling
from explora.config import Config, validate
from explora.errors import ConfigError, WeightsError
from explora.models.formats.checkpoint import (
    Architecture,
    Bands,
    Checkpoint,
    Groups,
    Scale,
    Source,
    Value,
    canonical_bands,
    channels_of,
)
from explora.models.positions import PositionMode


class Facts(Config):
    """All that `build` needs; files of older versions lack mean and std, bands and scaling."""

    name: str
    """timm's name of the architecture."""
    image_size: int = Field(ge=1)
    """Side in pixels of the images that its position embedding was made for."""
    options: dict[str, Value] = Field(default_factory=dict)
    """timm arguments that differ from the named architecture's."""
    positions: PositionMode = "timm"
    """How positions are resampled to other sizes."""
    channel_groups: Groups | None = None
    """Channels of each group, null where all are embedded at once."""
    mean: Scale | None = None
    """Channel mean of images in [0, 1] that the weights expect."""
    std: Scale | None = None
    """Their standard deviation."""
    bands: Bands | None = None
    """Bands of the channels in order, null where nobody knows."""
    scaling: Scaling | None = None
    """Which values become 0 and 1 before mean and std, null for display levels."""
    source: Source | None = None
    """Where the weights came from, null where nobody recorded it."""
    additions: dict[str, dict[str, Value]] = Field(default_factory=dict)
    """Settings of the extensions that are on it, by name."""

    _canonical = field_validator("bands")(canonical_bands)

    @model_validator(mode="after")
    def _check(self) -> Facts:
        mean, std = self.mean, self.std
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()) or min(std or (1,)) <= 0:
            raise ValueError(f"mean is {mean} and std {std}; a positive std belongs to every mean")
        low = None if self.scaling is None else self.scaling.low
        counts = {len(each) for each in (mean, self.bands, low) if each is not None}
        if len(counts) > 1:
            raise ValueError(f"mean, bands and scaling are of {' and '.join(map(str, sorted(counts)))} channels")
        return self


def facts(metadata: Mapping[str, Any], file: str) -> Facts:
    """Metadata that was checked.

    Raises:
        WeightsError: it is damaged, or that of an adapter.
    """
    if "method" in metadata:
        raise WeightsError(f"{file}: this is an adapter, no backbone; explora.adapt.attach puts it on its source model")
    try:
        return validate(Facts, metadata, file)
    except ConfigError as error:
        raise WeightsError(f"no backbone of ours, or damaged metadata: {error}") from None


def described(checkpoint: Checkpoint, facts: Facts, file: str) -> Checkpoint:
    """A checkpoint with what was recorded in the place of what was inferred.

    Raises:
        WeightsError: what is said of channels is of another number than the patch embedding's.
    """
    channels = channels_of(checkpoint.tensors)
    low = None if facts.scaling is None else facts.scaling.low
    for what, each in (("mean and std", facts.mean), ("names", facts.bands), ("scaling", low)):
        if each is not None and channels not in (0, len(each)):
            raise WeightsError(
                f"{file}: damaged metadata: {what} of {len(each)} channels, but its patch embedding has {channels}"
            )
    shaped = Architecture(
        facts.name,
        facts.image_size,
        facts.options,
        facts.positions,
        facts.channel_groups,
        facts.mean,
        facts.std,
        facts.bands,
        facts.scaling,
        additions=facts.additions,
        recorded=True,
    )
    source = facts.source or Source("explora", file, checkpoint.licence, checkpoint.inferred)
    return replace(checkpoint, format=source.format, architecture=shaped, source=source)
