"""`explora pack`: images to shards, through a recipe that knows where a data set keeps them."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from explora import config as configs
from explora.bands import Pixels
from explora.data import SHARD_MB, Recipe, ShardSet
from explora.data import pack as write_shards
from explora.data.shards.crew import Progress
from explora.errors import DataError
from explora.stages.training import logger

RECIPES = "explora.recipes"
"""Entry point group: each is a `Recipe`."""
SHARDS = "shards"
"""Folder for the shards that are not given one."""
LOG_EVERY = 10.0
"""Seconds between two lines on progress where there is no terminal."""

_ANYBODYS = frozenset({"folder", "table", "segmentation"})
"""Recipes for images of any data set, which is called after where it lies."""
_NAMELESS = frozenset({"train", "test", "val", "validation", "images", "png", "jpg", "jpeg", "tif", "tiff"})
"""Folders that say which part or which format of a data set they hold, and not which data set."""


def pack(
    root: str | Path,
    out: str | Path | None = None,
    recipe: str = "folder",
    split: str | None = None,
    name: str | None = None,
    shard_mb: int = SHARD_MB,
    workers: int | None = None,
    against: Sequence[str | Path] = (),
    pixels: str | Path | Mapping[str, Any] | None = None,
) -> ShardSet:
    """Pack the images below `root` into WebDataset shards in the new folder `out`.

    After a kill, the same call goes on from the shards that are finished.

    Args:
        root: where the data set lies.
        out: new folder; an existing one is refused. None makes it `shards/<name>`.
        recipe: how the data set is laid out; see `recipes()`.
        split: the part of the data set to pack; None packs all of it.
        name: what to call the data. None takes the names of recipe and split; for `folder`, `table` and `segmentation`
            that of the folder or table, or of the first folder above one called train, images, png or the like.
        shard_mb: size of a shard in MiB.
        workers: processes; 0 works in this one, None takes as many as there are cores.
        against: folders of shards, such as those of the test split, that should have no image in common with these;
            what they have is counted in the manifest and warned of.
        pixels: a YAML file, or a mapping, that says what the stored values mean: `Pixels`, with `bands` as a list of
            names; None leaves it to the recipe, 8-bit RGB for `folder`, `table` and `segmentation`.

    Raises:
        ConfigError: a mistake in `pixels`.
        DataError: unknown recipe, missing or empty folder, existing `out`, or no space.
        RunError: a worker process was killed.
    """
    others = [ShardSet.open(other) for other in against]
    listing = recipe_of(recipe)(Path(root), split)
    listing = listing if pixels is None else listing._replace(pixels=configs.load(Pixels, pixels))
    name = name or _name(Path(root), recipe, split)
    out = Path(SHARDS, name) if out is None else Path(out)
    _refuse_inside(out, Path(root), recipe)
    with watched(f"packing {root}") as progress:
        return write_shards(
            listing,
            out,
            name=name,
            shard_bytes=shard_mb * 2**20,
            workers=workers,
            against=others,
            progress=progress,
        )


def _refuse_inside(out: Path, root: Path, recipe: str) -> None:
    if recipe == "folder" and out.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{out}: lies in {root}, where it would pass for a class; give a folder outside of it")


def _name(root: Path, recipe: str, split: str | None) -> str:
    if recipe not in _ANYBODYS:
        return f"{recipe}-{split}" if split else recipe
    part = f"-{split}" if recipe == "table" and split else ""  # of a folder, the split is one more folder
    place = root.with_suffix("").resolve() if recipe == "table" else Path(root, split or "").resolve()
    named = (one.name for one in (place, *place.parents) if one.name and one.name.lower() not in _NAMELESS)
    return next(named, place.name) + part


@contextmanager
def watched(what: str) -> Iterator[Progress]:
    """A progress bar on a terminal, elsewhere a line in the log every ten seconds."""
    with tqdm(unit="img", desc=what, disable=None) as bar:
        before = 0
        start = said = time.monotonic()

        def move(done: int, total: int) -> None:
            nonlocal before, said
            now = time.monotonic()
            if not bar.disable:
                bar.total = total or None
                bar.update(done - bar.n)
            elif now - said >= LOG_EVERY:
                rate = (done - before) / (now - said)
                left = f", {tqdm.format_interval(int((total - done) / rate))} left" if total and rate else ""
                of = f" of {total}" if total else ""
                logger.info("%s: %d%s images after %.0f s, %.0f a second%s", what, done, of, now - start, rate, left)
                before, said = done, now

        yield move


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
