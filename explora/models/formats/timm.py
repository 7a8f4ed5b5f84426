"""timm's own names, and our exports, which are those with a note of what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from explora.errors import WeightsError
from explora.models.formats import dinov2, dinov3
from explora.models.formats.checkpoint import (
    UNKNOWN,
    Architecture,
    Checkpoint,
    Family,
    Known,
    Tensors,
    architecture,
    image_size,
    setting,
)
from explora.models.formats.mae import pooled
from explora.models.vit import timm

_SIZES = {
    "base": (768, 12, 12, 3072, (16, 8, 32)),
    "tiny": (192, 12, 3, 768, (16,)),
    "small": (384, 12, 6, 1536, (16, 8, 32)),
    "large": (1024, 24, 16, 4096, (16, 14, 32)),
    "huge": (1280, 32, 16, 5120, (14,)),
    "giant": (1408, 40, 16, 6144, (14,)),
    "gigantic": (1664, 48, 16, 8192, (14,)),
}
PLAIN = Family(
    [
        Known(f"vit_{size}_patch{patch}_224", width, depth, heads, hidden, patch, layer_scale=False)
        for size, (width, depth, heads, hidden, patches) in _SIZES.items()
        for patch in patches
    ]
)
_BEYOND = ("norm_pre.", "patch_embed.norm.", ".q_norm.", ".attn.norm.", ".mlp.norm.")


def read(tensors: Tensors) -> Checkpoint:
    """A file in timm's names without a word of what it is."""
    found, notes = pooled(dict(tensors))
    scaled = "blocks.0.ls1.gamma" in found
    if "blocks.0.gamma_1" in found and "pos_embed" not in found:
        return Checkpoint("timm", architecture(found, dinov3.FAMILY), found, notes=notes)
    class_row = _class_row(found)
    if scaled and ("reg_token" in found) != class_row and found["patch_embed.proj.weight"].shape[-1] == 14:
        return Checkpoint("timm", replace(dinov2.infer(found), positions="timm"), found, notes=notes)
    shaped = architecture(found, PLAIN)
    if "cls_token" not in found or "reg_token" in found or any(mark in name for name in found for mark in _BEYOND):
        shaped = replace(shaped, name=None)
    elif not class_row:
        shaped = replace(shaped, options={**shaped.options, "no_embed_class": True})
    return Checkpoint("timm", shaped, found, notes=notes, guesses=(normalisation_unknown(shaped),))


def own(tensors: Tensors, metadata: Mapping[str, Any], path: str) -> Checkpoint:
    """Our own export, which carries what `build` needs.

    Raises:
        WeightsError: the metadata lacks it.
    """
    groups, source = metadata.get("channel_groups"), metadata.get("source") or {}
    try:
        shaped = Architecture(
            str(metadata["name"]),
            int(metadata["image_size"]),
            dict(metadata["options"]),
            metadata.get("positions", "timm"),
            None if groups is None else tuple(tuple(int(band) for band in group) for group in groups),
            recorded=True,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: no backbone of ours, or damaged metadata: {type(error).__name__} {error}"
        ) from None
    found = Checkpoint(str(source.get("format", "explora")), shaped, dict(tensors))
    return replace(found, licence=str(source["licence"])) if "licence" in source else found


def folder(tensors: Tensors, config: Mapping[str, Any]) -> Checkpoint:
    """A folder of the hub's timm library, whose config.json names the architecture.

    Raises:
        WeightsError: config.json lacks it.
    """
    name, pretrained = setting(config, "architecture", str), setting(config, "pretrained_cfg", dict)
    tag = pretrained.get("tag")
    name = f"{name}.{tag}" if tag and timm.get_pretrained_cfg(f"{name}.{tag}", allow_unregistered=False) else name
    options = {
        key: value
        for key, value in setting({"model_args": {}, **config}, "model_args", dict).items()
        if key not in _OURS
    }
    found, notes = pooled(dict(tensors))
    patch = found["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in found else 1
    size = image_size(found, patch) or (pretrained.get("input_size") or [None])[-1]
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and any(
        tuple(pretrained.get(key, getattr(known, key))) != getattr(known, key) for key in _SCALE
    ):
        notes = (*notes, f"config.json gives another mean or std than timm's {name}, whose are taken")
    licence = str(pretrained.get("license") or UNKNOWN)
    return Checkpoint("timm", Architecture(name, size, options, recorded=True), found, licence=licence, notes=notes)


_OURS = {"num_classes", "global_pool", "fc_norm", "use_fc_norm", "img_size", "dynamic_img_size"}
"""Arguments of timm that `build` sets itself."""
_SCALE = ("mean", "std")


def normalisation_unknown(architecture: Architecture) -> str:
    """What to say of a plain ViT: several recipes share its shapes and differ in the images that they expect."""
    return (
        f"the weights do not say which mean and std their images had; those of timm's {architecture.name} are taken "
        "unless model.name says another"
    )


def _class_row(tensors: Tensors) -> bool:
    rows = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
    return round(max(0, rows - 1) ** 0.5) ** 2 == rows - 1
