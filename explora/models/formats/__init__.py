"""Formats of checkpoints: one small file each; `read` picks the one whose names a file has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from explora.errors import WeightsError
from explora.models.formats import dinov2, dinov3, explora_release, huggingface, mae, timm
from explora.models.formats.checkpoint import UNKNOWN, Architecture, Checkpoint, Tensors

__all__ = [
    "UNKNOWN",
    "Architecture",
    "Checkpoint",
    "dinov2",
    "dinov3",
    "explora_release",
    "huggingface",
    "mae",
    "read",
    "timm",
]


def read(tensors: Tensors, config: Mapping[str, Any] | None = None, wrapper: str | None = None) -> Checkpoint:
    """Bring a checkpoint under our names and tell its architecture from them.

    Args:
        tensors: without wrappers and prefixes such as `module.` or `backbone.`.
        config: the config.json of a folder of `transformers` or timm.
        wrapper: the outer key in a .pth file, which tells an MAE encoder from other plain ViTs.

    Raises:
        WeightsError: no backbone, or one of a kind that is not read.
    """
    _check_dimensions(tensors)
    if config is not None and "architecture" in config:
        return timm.folder(tensors, config)
    if config is not None or huggingface.matches(tensors):
        return huggingface.read(tensors, config)
    if dinov3.matches(tensors):
        return dinov3.read(tensors)
    if not any(name.startswith("patch_embed.") for name in tensors):
        some = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:3])
        raise WeightsError(f"no backbone in these weights, perhaps a head alone: {some}")
    if explora_release.matches(tensors):
        return explora_release.read(tensors)
    if dinov2.matches(tensors):
        return dinov2.read(tensors)
    return mae.read(tensors) if mae.matches(tensors, wrapper) else timm.read(tensors)


_ROWS = {
    "cls_token",
    "reg_token",
    "register_tokens",
    "storage_tokens",
    "pos_embed",
    "position_embeddings",
    "channel_embed",
}
"""Tensors of the shape (1, rows, D) by the last part of their names."""


def _check_dimensions(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        last = name.rpartition(".")[2]
        if tensor.dim() == 0 or (last in _ROWS and tensor.dim() != 3) or (last == "mask_token" and tensor.dim() < 2):
            raise WeightsError(
                f"these weights are no vision transformer that explora reads: {name} is {tuple(tensor.shape)}"
            )
