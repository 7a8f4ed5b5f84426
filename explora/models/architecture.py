"""What timm builds: an architecture by its name, whether our forward pass covers it, what its images are like."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from explora.bands import RGB
from explora.errors import WeightsError
from explora.models.blocks import known
from explora.models.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from timm.layers import PatchEmbed  # noqa: E402
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3  # noqa: E402
from timm.models import is_model_in_modules  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

Options = Mapping[str, int | float | bool | str]


def create(name: str, image_size: int, options: Options) -> VisionTransformer | Eva:
    """timm's model of this name, random, for square images of `image_size` pixels, without a head.

    Raises:
        WeightsError: timm has no such model, or it is no ViT that explora knows.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models()) or timm.list_models("vit_*")[:3]
        raise WeightsError(f"timm has no model '{name}'; near: {', '.join(near)}")
    # No fc_norm keeps the final norm on the tokens; models that pool the mean would move it behind the pool.
    norm = "use_fc_norm" if is_model_in_modules(architecture, {"eva"}) else "fc_norm"
    plain: dict[str, Any] = {"num_classes": 0, "global_pool": "", norm: False, "img_size": image_size}
    try:
        model = timm.create_model(architecture, pretrained=False, **{**plain, **options})
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        reason = str(error) or f"timm refuses it with {type(error).__name__} and no word why"
        raise WeightsError(f"'{architecture}' with {dict(options)} is no plain vision transformer: {reason}") from None
    return covered(model, architecture)


def bands_of(named: tuple[str, ...] | None, channels: int) -> tuple[str, ...] | None:
    """The bands that were named; red, green, blue where nobody named any and there are three.

    Raises:
        WeightsError: they are not as many as the channels.
    """
    if named is not None and len(named) != channels:
        raise WeightsError(f"model.bands names {len(named)} bands, but the model takes {channels} channels")
    return named or (RGB if channels == len(RGB) else None)


def normalisation(
    name: str, channels: int, bands: tuple[str, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel mean and std that timm gives for an architecture; 0 and 1 for bands that it cannot know."""
    if bands is None or set(bands) != set(RGB):
        return (0.0,) * channels, (1.0,) * channels
    registered = timm.get_pretrained_cfg(name, allow_unregistered=True)
    known = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if registered is None else (registered.mean, registered.std)
    mean, std = (tuple(each[RGB.index(band)] for band in bands) for each in known)
    return mean, std


def covered(model: nn.Module, name: str) -> VisionTransformer | Eva:
    """The model itself, if the forward pass of `ViT` covers all its parts.

    Raises:
        WeightsError: it does not.
    """
    # Exact types: a distillation token or a ResNet stem comes as a subclass and would be left out in silence.
    if (type(model) is VisionTransformer or (type(model) is Eva and _rotates(model))) and (
        type(model.patch_embed) is PatchEmbed and all(known(block) for block in model.blocks)
    ):
        return model
    raise WeightsError(
        f"'{name}' ({type(model).__name__}) is more than a plain timm VisionTransformer (vit_*, deit_*, DINOv2, MAE) "
        "or DINOv3, the only kinds that explora adapts"
    )


def _rotates(model: Eva) -> bool:
    """Whether its positions are DINOv3's alone, without augmentation."""
    return model.pos_embed is None and type(model.rope) is RotaryEmbeddingDinoV3 and not model.rope.aug_active
