"""The data room: packed shards, the order of samples, and the views made of them."""

from typing import Annotated, TypeAlias

from pydantic import Field

from explora.data.decode import decode
from explora.data.index import ShardSet
from explora.data.intake import Intake
from explora.data.listing import Listing, RawSample, Recipe
from explora.data.manifest import Skipped
from explora.data.masked import MaskedCrop
from explora.data.pack import SHARD_MB, pack
from explora.data.stream import Position, Step, Stream, batches, crops
from explora.data.views import Center, Crop, Key, MultiCrop, Views

AnyViews: TypeAlias = Annotated[MultiCrop | MaskedCrop | Crop | Center, Field(discriminator="name")]

__all__ = [
    "SHARD_MB",
    "AnyViews",
    "Center",
    "Crop",
    "Intake",
    "Key",
    "Listing",
    "MaskedCrop",
    "MultiCrop",
    "Position",
    "RawSample",
    "Recipe",
    "ShardSet",
    "Skipped",
    "Step",
    "Stream",
    "Views",
    "batches",
    "crops",
    "decode",
    "pack",
]
