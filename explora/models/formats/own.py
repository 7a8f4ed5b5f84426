"""What our own files say of themselves: in safetensors metadata, in config.json, or in explora.json beside a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator

from explora.config import Config, validate
from explora.errors import ConfigError, WeightsError
from explora.models.formats.checkpoint import Architecture, Checkpoint, Groups, Scale, Source, Value
from explora.models.positions import PositionMode


class Facts(Config):
    """All that `build` needs; files of older versions lack mean and std."""

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
    source: Source | None = None
    """Where the weights came from, null where nobody recorded it."""

    @model_validator(mode="after")
    def _check(self) -> Facts:
        mean, std = self.mean, self.std
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()) or min(std or (1,)) <= 0:
            raise ValueError(f"mean is {mean} and std {std}; a positive std belongs to every mean")
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
        WeightsError: mean and std are of other channels than the patch embedding's.
    """
    convs = [
        tensor for name, tensor in checkpoint.tensors.items() if re.match(r"patch_embed\.(\d+\.)?proj\.weight$", name)
    ]
    channels = sum(conv.shape[1] for conv in convs if conv.dim() == 4)
    if facts.mean is not None and channels not in (0, len(facts.mean)):
        raise WeightsError(
            f"{file}: damaged metadata: mean and std of {len(facts.mean)} channels, but its patch "
            f"embedding has {channels}"
        )
    shaped = Architecture(
        facts.name,
        facts.image_size,
        facts.options,
        facts.positions,
        facts.channel_groups,
        facts.mean,
        facts.std,
        recorded=True,
    )
    source = facts.source or Source("explora", file, checkpoint.licence, checkpoint.inferred)
    return replace(checkpoint, format=source.format, architecture=shaped, source=source)
