"""The data room: packed shards, the order of samples, and the views made of them."""

from typing import Annotated, TypeAlias

from pydantic import Field

from explora.data.index import ShardSet, Skipped, decode
from explora.data.masked import MaskedCrop
from explora.data.pack import SHARD_MB, RawSample, pack
from explora.data.stream import Position, Step, Stream, batches
from explora.data.views import Center, Crop, Key, MultiCrop, Views

AnyViews: TypeAlias = Annotated[MultiCrop | MaskedCrop | Crop | Center, Field(discriminator="name")]

__all__ = [
    "SHARD_MB",
    "AnyViews",
    "Center",
    "Crop",
    "Key",
    "MaskedCrop",
    "MultiCrop",
    "Position",
    "RawSample",
    "ShardSet",
    "Skipped",
    "Step",
    "Stream",
    "Views",
    "batches",
    "decode",
    "pack",
]
