"""timm's own names: a file without a word of what it is, and a folder of its hub, which says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
    pooled,
    scale,
    setting,
)
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
_OURS = {"num_classes", "global_pool", "fc_norm", "use_fc_norm", "img_size", "dynamic_img_size"}
"""Arguments of timm that `build` sets itself."""
_BEYOND = ("norm_pre.", "patch_embed.norm.", ".q_norm.", ".attn.norm.", ".mlp.norm.")


def read(tensors: Tensors) -> Checkpoint:
    """A file in timm's names without a word of what it is."""
    found, notes = pooled(dict(tensors))
    if "blocks.0.gamma_1" in found and "pos_embed" not in found:
        return Checkpoint("timm", dinov3.infer(found), found, notes=notes)
    class_row = _class_row(found)
    if _as_dinov2(found) and ("reg_token" in found) != class_row:
        return Checkpoint("timm", replace(dinov2.infer(found), positions="timm"), found, notes=notes)
    shaped = replace(architecture(found, PLAIN), sure_of_mean=False)
    if "cls_token" not in found or "reg_token" in found or any(mark in name for name in found for mark in _BEYOND):
        shaped = replace(shaped, name=None)
    elif not class_row:
        shaped = replace(shaped, options={**shaped.options, "no_embed_class": True})
    return Checkpoint("timm", shaped, found, notes=notes)


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
    mean, std = scale(pretrained, "mean", "std")
    shaped = Architecture(name, size, options, mean=mean, std=std, recorded=True)
    return Checkpoint("timm", shaped, found, licence=str(pretrained.get("license") or UNKNOWN), notes=notes)


def _as_dinov2(tensors: Tensors) -> bool:
    """Whether there is LayerScale with DINOv2's patches or its gated MLP, which no plain ViT of timm has."""
    patches, first, last = (
        tensors.get(f"{name}.weight") for name in ("patch_embed.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")
    )
    if "blocks.0.ls1.gamma" not in tensors or patches is None:
        return False
    gated = first is not None and last is not None and last.dim() == 2 and first.shape[0] == 2 * last.shape[1]
    return gated or patches.shape[-1] == 14


def _class_row(tensors: Tensors) -> bool:
    rows = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
    return round(max(0, rows - 1) ** 0.5) ** 2 == rows - 1
