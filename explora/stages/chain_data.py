"""The sets of a chain: where they are, what is known of them before anything is done, and packing them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from explora.bands import Pixels
from explora.data import ShardSet, overlap
from explora.errors import ConfigError, DataError
from explora.stages.pack import pack, recipe_of
from explora.stages.probe_config import SETS, DataSets


class DataConfig(DataSets):
    """Folders of images, or of shards that `explora pack` wrote; folders are packed into the run."""

    pretrain: str | None = None
    """Target images to pretrain on, labelled or not; null takes those of `train`."""
    recipe: str = "folder"
    """How the folders are laid out; those with masks always as the recipe `segmentation` says."""
    pixels: Pixels | None = None
    """What the values of raw images mean, where the recipe does not know: bands, dtype, unit, scale, offset."""

    def folders(self) -> dict[str, str]:
        """What is given, by role."""
        return {role: folder for role in ("pretrain", *SETS) if (folder := getattr(self, role)) is not None}

    def recipe_for(self, role: str) -> str:
        """How the folder of a role is laid out."""
        return "segmentation" if role.startswith("masks_") else self.recipe


class RawSet(NamedTuple):
    """What is known of images before they are packed, by the names that `ShardSet` has for it."""

    folder: Path
    classes: list[str] | None
    masks: list[str] | None
    multilabel: bool
    pixels: Pixels


def look(data: DataConfig, role: str, shards: Path) -> ShardSet | RawSet:
    """The set of a role: as it was given packed, as it was packed below `shards`, or as the recipe finds it.

    Raises:
        ConfigError: it is packed already, and its values are not what `data.pixels` says.
        DataError: it cannot be read.
    """
    origin = Path(data.folders()[role])
    place = next((one for one in (origin, shards / role) if _packed(one)), origin)
    with _called(role):
        if not _packed(place):
            listing = recipe_of(data.recipe_for(role))(place, None)
            first = next(iter(listing.samples), None)
            multilabel = first is not None and isinstance(first.label, tuple)
            return RawSet(place, listing.classes, listing.masks, multilabel, data.pixels or listing.pixels)
        packed = ShardSet.open(place)
    if data.pixels is not None and _meaning(packed.pixels) != _meaning(data.pixels):
        raise ConfigError(
            f"data.pixels: {place} is packed already, and its values mean something else; leave data.pixels out, "
            "or give the images that were packed"
        )
    return packed


def pack_all(folder: Path, data: DataConfig) -> None:
    """Pack raw folders, link packed ones, so that a run holds them all by their roles.

    Raises:
        DataError: images cannot be packed, or are others than when they were packed.
    """
    pixels = None if data.pixels is None else data.pixels.model_dump(mode="json")
    for role, origin in data.folders().items():
        with _called(role):
            if (folder / role).exists():
                _refuse_changed(folder / role, origin, data.recipe_for(role))
            elif _packed(Path(origin)):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / role).unlink(missing_ok=True)  # a link whose target has moved
                (folder / role).symlink_to(Path(origin).resolve())
            else:
                pack(origin, folder / role, recipe=data.recipe_for(role), pixels=pixels)


_TAUGHT = (
    *(("train", "test"), ("pretrain", "test"), ("source_train", "source_test")),
    *(("masks_train", "masks_test"), ("train", "masks_test"), ("pretrain", "masks_test")),
)
"""What teaches, and what must not have."""


def leaks(folder: Path, validation: str | None = None) -> list[str]:
    """What judges although it has taught, or has chosen, a sentence for each pair of sets.

    Args:
        folder: the shards of a chain by their roles.
        validation: shards of their own that fine-tuning chooses its best step on.
    """
    pairs = [(f"data.{taught}", folder / taught, judges) for taught, judges in _TAUGHT]
    pairs += [("finetune.validation.shards", Path(validation), "test")] if validation else []
    found = []
    for name, taught, judges in pairs:
        if taught.exists() and (folder / judges).exists():
            a, b = ShardSet.open(taught), ShardSet.open(folder / judges)
            if leaked := len(overlap(b, a)):
                found.append(f"data.{judges}: {leaked} of its {len(b)} images are in {name}, too")
    return found


@contextmanager
def _called(role: str) -> Iterator[None]:
    """Say of which set an error is."""
    try:
        yield
    except DataError as error:
        raise DataError(f"data.{role}: {error}") from None


def _meaning(pixels: Pixels) -> dict[str, Any]:
    """What stored values are, without what was measured of them."""
    return {**pixels.model_dump(exclude={"bands"}), "names": pixels.names}


def _refuse_changed(shards: Path, origin: str, recipe: str) -> None:
    """Shards are not packed anew: a folder that grew since would go unnoticed."""
    if shards.is_symlink() or not Path(origin).exists():
        return
    packed = ShardSet.open(shards)
    before, now = len(packed) + packed.manifest.left_out, sum(1 for _ in recipe_of(recipe)(Path(origin), None).samples)
    if now != before:
        raise DataError(
            f"{origin} has changed since its images were packed: {now} images now, {before} then; "
            f"remove {shards} and the stages beside it that learnt from it, or choose another out"
        )


def _packed(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()
