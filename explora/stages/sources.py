"""Where a training stage's images come from: one set of shards, several by weight, or tars from afar."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from pydantic import Field

from explora.bands import Pixels
from explora.config import Config
from explora.data import Mixture, RemoteConfig, RemoteSet, ShardSet, Views, refuse_strange, remote, stage
from explora.distributed import on_first


class Weighted(Config):
    """One set of a mixture."""

    path: str
    """Folder that `explora pack` wrote."""
    weight: float = Field(1.0, gt=0)
    """Its share of the images of a run, as a part of all weights."""


Sources: TypeAlias = str | tuple[Weighted, ...] | RemoteConfig
"""A folder of shards, or a URL; several folders with weights; URLs with their settings."""
AnySet: TypeAlias = ShardSet | Mixture | RemoteSet


def opened_set(sources: Sources, scratch: str | None = None) -> AnySet:
    """Open what a config names, from copies on this node's own disk where there is a `scratch` folder.

    Raises:
        DataError: a folder is missing, damaged or does not fit on the scratch disk.
        ConfigError: the weights leave a set out, or a URL is of no kind that can be read.
    """
    if isinstance(sources, RemoteConfig):
        return RemoteSet(sources)
    if isinstance(sources, str):
        return RemoteSet(RemoteConfig(urls=sources)) if remote(sources) else local_set(sources, scratch)
    sets = [local_set(source.path, scratch) for source in sources]
    return Mixture(sets, [source.weight for source in sources])


def foreseen(sources: Sources) -> AnySet | None:
    """What `opened_set` would open, read where it is; None where folders are not there yet. Nothing remote is read.

    Raises:
        DataError, ConfigError: see `opened_set`.
    """
    return opened_set(sources) if all(Path(place).exists() for place in folders(sources).values()) else None


def folders(sources: Sources) -> dict[str, str]:
    """Folders that must be there, by their key in the config."""
    if isinstance(sources, str) and not remote(sources):
        return {"shards": sources}
    if isinstance(sources, tuple):
        return {f"shards.{number}.path": source.path for number, source in enumerate(sources)}
    return {}


def pixels_in(*places: str | None) -> Pixels | None:
    """What the values of packed shards are, of the first of some folders that are there; None where there are none.

    Raises:
        DataError: the shards are damaged.
    """
    packed = [place for place in places if place is not None and (Path(place) / "manifest.json").is_file()]
    return ShardSet.open(packed[0]).pixels if packed else None


def refuse_strange_sets(found: AnySet, views: Views) -> None:
    """Look at some images of every set that can be looked at, before anything is learnt from them.

    Raises:
        DataError: their values contradict what the manifest says of them, or would nearly all be clipped.
    """
    local = found.sets if isinstance(found, Mixture) else [found] if isinstance(found, ShardSet) else []

    def look() -> None:
        for shards in local:
            refuse_strange(shards, views)

    on_first(look)


def local_set(folder: str, scratch: str | None = None) -> ShardSet:
    """One folder of shards, from a copy in `scratch` where that is given."""
    return ShardSet.open(folder if scratch is None else stage(folder, scratch))
