"""Official ExPLoRA releases: DINOv2's or MAE's names with `q_proj`, `k_proj`, `v_proj` beside the merged `qkv`."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from explora.errors import WeightsError
from explora.models.formats import dinov2, mae
from explora.models.formats.checkpoint import Checkpoint, Tensors

_SPLIT = re.compile(r"\.attn\.(q_proj|k_proj|v_proj)\.(weight|bias)$")
_LORA = re.compile(r"\.lora_")


def matches(tensors: Tensors) -> bool:
    """Whether projections stand beside a fused `qkv`."""
    return any(_SPLIT.search(name) for name in tensors) and any(".attn.qkv." in name for name in tensors)


def read(tensors: Tensors) -> Checkpoint:
    """The merged `qkv` is what counts; its thirds must be the projections beside it.

    Raises:
        WeightsError: they are not, or low-rank factors are there (the file was saved before merging).
    """
    if any(_LORA.search(name) for name in tensors):
        raise WeightsError("these ExPLoRA weights still hold low-rank factors; save them merged, as official ones are")
    short = dinov2.unchunked(tensors)
    split = tuple(name for name in short if _SPLIT.search(name))
    for name in split:
        _check(name, short)
    rest = {name: tensor for name, tensor in short.items() if name not in split}
    found = dinov2.read(rest) if dinov2.matches(rest) else mae.read(rest)
    return replace(found, format="explora-release", ignored=(*found.ignored, *split))


def _check(name: str, tensors: Tensors) -> None:
    third = "qkv".index(_SPLIT.search(name)[1][0])  # type: ignore[index]
    fused: Tensor | None = tensors.get(_SPLIT.sub(r".attn.qkv.\2", name))
    if fused is None or fused.shape[0] % 3 or fused.chunk(3)[third].shape != tensors[name].shape:
        raise WeightsError(f"{name}: there is no fused qkv of its size beside it")
    if not fused.is_meta and not torch.equal(fused.chunk(3)[third], tensors[name]):
        raise WeightsError(f"{name} differs from its third of the merged qkv; these weights were not merged")
