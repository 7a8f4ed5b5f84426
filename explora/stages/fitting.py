"""What a config leaves open of its views follows the backbone: bands, range, mean and std, sizes."""

from __future__ import annotations

from typing import Final, TypeVar

from explora import config as configs
from explora.bands import RGB, Pixels, Scaling
from explora.data import Views, normalisation, settle, whole_range
from explora.errors import ConfigError
from explora.models import ViT

RANGE: Final = ("scaling", "mean", "std")
"""Keys of views that follow the statistics of the shards where neither the config nor the backbone says them."""
V = TypeVar("V", bound=Views)


def fit_views(views: V, vit: ViT, pixels: Pixels | None = None) -> V:
    """Fill what the config left open with the backbone's own: bands, patch size, image size, mean and std.

    Args:
        pixels: what the images' values mean; the range that becomes [0, 1] is settled by their statistics where
            neither the config nor the backbone says one. None where they are not known yet.

    Raises:
        ConfigError: a crop size does not fit the patches, or the bands or the range not the backbone.
        DataError: statistics are needed, but the shards have none.
    """
    patch = vit.patch_size
    bands = bands_of(views, vit, pixels)
    scaled: Views = views.model_copy(update={"bands": bands})
    if pixels is not None:
        scaled = settle(scaled, pixels, vit.scaling)
    mean, std = _normalisation(vit, scaled, pixels)
    facts = {
        "bands": bands,
        "mean": mean,
        "std": std,
        "patch_size": patch,
        "groups": vit.groups,
        "size": vit.image_size,
        "global_size": vit.image_size,
        "local_size": max(1, round(vit.image_size * 3 / 7 / patch)) * patch,
    }
    open_fields = {
        name: value
        for name, value in facts.items()
        if name in type(views).model_fields and name not in views.model_fields_set
    }
    given = views.model_dump(exclude_unset=True)
    fit = configs.validate(type(views), {**given, **open_fields, "scaling": scaled.scaling}, "views")
    written = fit.model_dump()
    for key, own in (("patch_size", patch), ("groups", vit.groups)):
        if written.get(key, own) != own:
            raise ConfigError(f"views.{key}: {written[key]}, but that of {vit.name} is {own}; leave it out")
    _refuse_sides(fit, patch)
    return fit


def bands_of(views: Views, vit: ViT, pixels: Pixels | None = None) -> tuple[str, ...]:
    """The bands that a backbone is fed: what the config says, else what the backbone knows.

    Args:
        pixels: as for `fit_views`; without them, bands that nobody names are called by number.

    Raises:
        ConfigError: neither names them, or they do not fit the backbone.
    """
    if "bands" in views.model_fields_set:
        if len(views.bands) != vit.channels or vit.bands not in (None, views.bands):
            own = ", ".join(vit.bands) if vit.bands else f"{vit.channels} channels"
            raise ConfigError(f"views.bands: {', '.join(views.bands)}, but {vit.name} takes {own}; set model.bands")
        return views.bands
    if vit.bands is not None:
        return vit.bands
    if pixels is None:
        return tuple(f"band{number}" for number in range(vit.channels))
    # Not the stored order, even of as many bands: weights of the same bands in another order would fail in silence.
    raise ConfigError(
        f"model.bands is needed: {vit.name} takes {vit.channels} channels, and nothing says which these are; the "
        f"images hold [{', '.join(pixels.names)}]: copy those that the weights were trained on, in their order"
    )


def _normalisation(vit: ViT, views: Views, pixels: Pixels | None) -> tuple[tuple[float, ...], ...]:
    """Mean and std of the scaled bands: the backbone's where it has seen such, else those of the images."""
    scaling = views.scaling
    known = vit.scaling or (whole_range(RGB) if vit.bands == RGB else None)  # weights of others have seen photographs
    if pixels is None or not isinstance(scaling, Scaling) or scaling == known:
        return vit.mean, vit.std
    return normalisation(pixels, scaling, views.bands)


def _refuse_sides(views: Views, patch: int) -> None:
    for side in views.sides():
        if side < 2 * patch:
            raise ConfigError(
                f"views: a crop of {side} px is less than two patches of {patch} px; use {2 * patch} or more"
            )
        if side % patch:
            low = max(1, side // patch) * patch
            raise ConfigError(
                f"views: a crop of {side} px is no multiple of the patch size {patch}; use {low} or {low + patch}"
            )


def expects(vit: ViT, views: Views) -> None:
    """Record in a backbone what it learns from, which is what it expects from now on."""
    vit.mean, vit.std, vit.bands = views.mean, views.std, views.bands
    vit.scaling = views.scaling if isinstance(views.scaling, Scaling) else None
