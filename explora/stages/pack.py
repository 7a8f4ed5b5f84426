"""`explora pack`: images to shards, through a recipe that knows where a data set keeps them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from explora.data import SHARD_MB, Recipe, ShardSet
from explora.data import pack as write_shards
from explora.errors import DataError
from explora.stages.training import logger

RECIPES = "explora.recipes"
"""Entry point group: each is a `Recipe`."""

_SPLITS = frozenset({"train", "test", "val", "validation"})


def pack(root: str | Path, out: str | Path, recipe: str = "folder", shard_mb: int = SHARD_MB) -> ShardSet:
    """Pack the images below `root` into WebDataset shards in the new folder `out`.

    The shards take the name of the folder, or of the one above where it is only called train, test or val.

    Args:
        root: where the data set lies.
        out: new folder; an existing one is refused.
        recipe: how the data set is laid out; see `recipes()`.
        shard_mb: size of a shard in MiB.

    Raises:
        DataError: unknown recipe, missing or empty folder, existing `out`, or no space.
    """
    listing = recipe_of(recipe)(Path(root), None)
    with tqdm(unit="img", desc=f"packing {root}", disable=None) as bar:
        shards = write_shards(
            listing,
            out,
            name=_name(Path(root).resolve()),
            shard_bytes=shard_mb * 2**20,
            progress=bar_at(bar),
        )
    for skipped in shards.skipped[:10]:
        logger.warning("skipped %s: %s", skipped.path, skipped.reason)
    logger.info(
        "%s: %d images in %d shard(s), %s, %d skipped",
        *(out, len(shards), len(shards.manifest.shards)),
        f"{len(shards.classes)} classes" if shards.classes else "no labels",
        len(shards.skipped),
    )
    return shards


def _name(root: Path) -> str:
    return root.parent.name if root.name.lower() in _SPLITS and root.parent.name else root.name


def bar_at(bar: tqdm) -> Callable[[int], None]:
    """A callback that moves a progress bar to so many images done."""

    def move(done: int) -> None:
        bar.update(done - bar.n)

    return move


def recipes() -> dict[str, importlib.metadata.EntryPoint]:
    """All installed recipes by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=RECIPES)}


def recipe_of(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        DataError: there is none.
    """
    known = recipes()
    if name not in known:
        raise DataError(f"no recipe '{name}'; known: {', '.join(sorted(known)) or 'none (install explora with pip)'}")
    recipe: Recipe = known[name].load()
    return recipe
