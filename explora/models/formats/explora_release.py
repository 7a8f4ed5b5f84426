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
_PROJECTION = re.compile(r"(\.attn\.[qkv]_proj)\.lora_.*$")


def matches(tensors: Tensors) -> bool:
    """Whether projections stand beside a fused `qkv`."""
    return any(_SPLIT.search(name) for name in tensors) and any(".attn.qkv." in name for name in tensors)


def read(tensors: Tensors) -> Checkpoint:
    """The merged `qkv` is what counts; its thirds must be the projections beside it.

    Low-rank factors may have stayed beside a projection that they were merged into.

    Raises:
        WeightsError: they are not (the file was saved before merging), or factors of another layer are there.
    """
    short = dinov2.unchunked(tensors)
    split = tuple(name for name in short if _SPLIT.search(name))
    for name in split:
        _check(name, short)
    factors = tuple(name for name in short if _LORA.search(name))
    for name in factors:
        if _PROJECTION.sub(r"\1.weight", name) not in split:
            raise WeightsError(
                f"these ExPLoRA weights still hold low-rank factors, and nothing shows that {name} was merged; save "
                "them merged, as official ones are"
            )
    rest = {name: tensor for name, tensor in short.items() if name not in {*split, *factors}}
    found = dinov2.read(rest) if dinov2.matches(rest) else mae.read(rest)
    shaped = replace(found.architecture, sure_of_mean=False)
    return replace(found, format="explora-release", architecture=shaped, ignored=(*found.ignored, *split, *factors))


def _check(name: str, tensors: Tensors) -> None:
    third = "qkv".index(_SPLIT.search(name)[1][0])  # type: ignore[index]
    fused: Tensor | None = tensors.get(_SPLIT.sub(r".attn.qkv.\2", name))
    if fused is None or fused.shape[0] % 3 or fused.chunk(3)[third].shape != tensors[name].shape:
        raise WeightsError(f"{name}: there is no fused qkv of its size beside it")
    if not fused.is_meta and not torch.equal(fused.chunk(3)[third], tensors[name]):
        raise WeightsError(f"{name} differs from its third of the merged qkv; these weights were not merged")
