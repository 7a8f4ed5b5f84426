"""The data room: packed shards, the order of samples, and the views made of them."""

from explora.data.index import ShardSet, Skipped, decode
from explora.data.pack import SHARD_MB, RawSample, pack
from explora.data.stream import Position, Step, Stream, batches
from explora.data.views import AnyViews, Center, Crop, Key, MultiCrop, Views

__all__ = [
    "SHARD_MB",
    "AnyViews",
    "Center",
    "Crop",
    "Key",
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
