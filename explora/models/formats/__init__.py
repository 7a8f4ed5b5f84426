"""Formats of checkpoints: one small file each; `read` picks the one whose names a file has."""

from __future__ import annotations

from explora.errors import WeightsError
from explora.models.account import check_kinds
from explora.models.files import WeightsFile
from explora.models.formats import dinov2, dinov3, explora_release, huggingface, mae, own, timm
from explora.models.formats.checkpoint import UNKNOWN, Architecture, Checkpoint, Source, Tensors

__all__ = [
    "UNKNOWN",
    "Architecture",
    "Checkpoint",
    "Source",
    "dinov2",
    "dinov3",
    "explora_release",
    "huggingface",
    "mae",
    "own",
    "read",
    "timm",
]


def read(file: WeightsFile) -> Checkpoint:
    """Bring a checkpoint under our names and tell its architecture, from our metadata or else from the names.

    Raises:
        WeightsError: no backbone, one of a kind that is not read, damaged metadata, or no dense floats.
    """
    check_kinds(file.tensors, file.name)
    _check_dimensions(file.tensors)
    if file.metadata:
        facts = own.facts(file.metadata, file.name)
        return own.described(Checkpoint("explora", Architecture(None), dict(file.tensors)), facts, file.name)
    found = _by_names(file)
    return own.described(found, own.facts(file.described, file.name), file.name) if file.described else found


def _by_names(file: WeightsFile) -> Checkpoint:
    tensors, config = file.tensors, file.config
    if config is not None and "architecture" in config:
        return timm.folder(tensors, config)
    if config is not None or huggingface.matches(tensors):
        return huggingface.read(tensors, config, file.preprocessor)
    if dinov3.matches(tensors):
        return dinov3.read(tensors, file.name)
    if not any(name.startswith("patch_embed.") for name in tensors):
        some = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in list(tensors.items())[:3])
        raise WeightsError(f"no backbone in these weights, perhaps a head alone: {some}")
    if explora_release.matches(tensors):
        return explora_release.read(tensors)
    if dinov2.matches(tensors):
        return dinov2.read(tensors)
    return mae.read(tensors, file.name) if mae.matches(tensors, file.wrapper) else timm.read(tensors)


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
