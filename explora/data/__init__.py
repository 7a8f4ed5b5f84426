"""The data room: packed shards, the order of samples, and the views made of them."""

from typing import Annotated, TypeAlias

from pydantic import Field

from explora.data.crop import Crop
from explora.data.decode import decode
from explora.data.intake import Intake, normalisation, refuse_strange, settle, whole_range
from explora.data.masked import MaskedCrop
from explora.data.mixture import Mixture
from explora.data.order import Order
from explora.data.randaugment import RandAugment
from explora.data.remote import RemoteConfig, RemoteSet, RemoteStream, remote
from explora.data.shards.index import ShardSet, overlap
from explora.data.shards.listing import Listing, RawSample, Recipe
from explora.data.shards.manifest import Skipped
from explora.data.shards.pack import SHARD_MB, pack
from explora.data.shards.staging import stage
from explora.data.stream import Position, Step, Stream, batches, crops
from explora.data.views import Center, Key, MultiCrop, Views

AnyViews: TypeAlias = Annotated[MultiCrop | MaskedCrop | Crop | Center, Field(discriminator="name")]
AnyStream: TypeAlias = Stream | RemoteStream

__all__ = [
    "SHARD_MB",
    "AnyStream",
    "AnyViews",
    "Center",
    "Crop",
    "Intake",
    "Key",
    "Listing",
    "MaskedCrop",
    "Mixture",
    "MultiCrop",
    "Order",
    "Position",
    "RandAugment",
    "RawSample",
    "Recipe",
    "RemoteConfig",
    "RemoteSet",
    "RemoteStream",
    "ShardSet",
    "Skipped",
    "Step",
    "Stream",
    "Views",
    "batches",
    "crops",
    "decode",
    "normalisation",
    "overlap",
    "pack",
    "refuse_strange",
    "remote",
    "settle",
    "stage",
    "whole_range",
]
