"""Official DINOv3 ViTs, into the names of timm's Eva class."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from explora.errors import WeightsError
from explora.models.formats.checkpoint import Architecture, Checkpoint, Family, Known, Tensors, architecture, rename
from explora.models.vit import timm

LICENCE = "DINOv3 License"
_SIZES = (
    ("small", 384, 12, 6, 1536, False),
    ("small_plus", 384, 12, 6, 1536, True),
    ("base", 768, 12, 12, 3072, False),
    ("large", 1024, 24, 16, 4096, False),
    ("huge_plus", 1280, 32, 20, 5120, True),
)
FAMILY = Family(
    [
        Known(f"vit_{size}_patch16_dinov3{ending}", width, depth, heads, hidden, 16, 4, gated, qkv_bias=bool(ending))
        for ending in ("_qkvb", "")
        for size, width, depth, heads, hidden, gated in _SIZES
    ]
    + [Known("vit_7b_patch16_dinov3", 4096, 40, 32, 8192, 16, 4, swiglu=True, qkv_bias=False)],
    registers="num_reg_tokens",
)
_NAMES = {
    "storage_tokens": "reg_token",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
}
_IGNORED = re.compile(r"^(local_cls_norm|dino_head|ibot_head)\.|^rope_embed\.periods$|\.attn\.qkv\.bias_mask$")


def matches(tensors: Tensors) -> bool:
    """Whether the names are those of DINOv3's own code."""
    return "storage_tokens" in tensors or "rope_embed.periods" in tensors


def read(tensors: Tensors, file: str = "") -> Checkpoint:
    """Registers, scales and gates under timm's names; `qkv.bias` without the keys' third, which is masked.

    Args:
        file: its name, which tells what the 7B was trained on.

    Raises:
        WeightsError: rotary periods or a bias of the keys that timm's model does not have.
    """
    _check_periods(tensors)
    found = rename(tensors, _NAMES)
    ignored = tuple(name for name in found if _IGNORED.search(name))
    ours: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if name in ignored:
            continue
        if name.endswith(".attn.qkv.bias") and tensor.shape[0] % 3 == 0:
            query, key, value = tensor.chunk(3)
            _check_keys(name, key, found.get(f"{name}_mask"))
            ours |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
        else:
            ours[name] = tensor
    heads = _heads(tensors)
    shaped = _trained_on(architecture(ours, FAMILY, heads=heads), file, untied="local_cls_norm.weight" in ignored)
    return Checkpoint("dinov3", shaped, ours, ignored=ignored, licence=LICENCE, inferred=True)


def infer(ours: Tensors) -> Architecture:
    """The architecture of a file in timm's names, which do not tell SAT-493M from LVD-1689M."""
    shaped = architecture(ours, FAMILY)
    return replace(shaped, sure_of_mean=not shaped.options and not _on_satellites(shaped))


def _trained_on(shaped: Architecture, file: str, *, untied: bool) -> Architecture:
    """With the tag of SAT-493M where the file is one: of the two ViT-L it has the untied norm; else by its name."""
    if shaped.name is None or shaped.options or not (tag := _on_satellites(shaped)):
        return replace(shaped, sure_of_mean=not shaped.options or "lvd1689m" in file)
    large = shaped.name.startswith("vit_large")
    if "sat493m" in file or (large and untied and "lvd1689m" not in file):
        known: Any = timm.get_pretrained_cfg(tag)
        return replace(shaped, name=tag, mean=tuple(known.mean), std=tuple(known.std))
    return replace(shaped, sure_of_mean=large or "lvd1689m" in file)


def _on_satellites(shaped: Architecture) -> str | None:
    """timm's tag for the weights of SAT-493M, if that size has them."""
    tag = f"{shaped.name}.sat493m"
    return tag if tag in timm.list_pretrained(f"{shaped.name}.*") else None


def _heads(tensors: Tensors) -> int | None:
    """A head has four elements a rotary period: sine and cosine of both axes."""
    width, periods = tensors.get("norm.weight"), tensors.get("rope_embed.periods")
    if width is None or periods is None or periods.numel() == 0 or width.numel() % (4 * periods.numel()):
        return None
    return width.numel() // (4 * periods.numel())


def _check_periods(tensors: Tensors) -> None:
    """Periods are `100 ** (i / n)`; they may be stored in bf16."""
    periods = tensors.get("rope_embed.periods")
    if periods is None or periods.is_meta:
        return
    expected = 100.0 ** (torch.arange(len(periods)) / len(periods))
    if not torch.allclose(periods.float(), expected, rtol=1e-2):
        raise WeightsError("rope_embed.periods are not DINOv3's (base 100), the only ones that timm's model has")


def _check_keys(name: str, key: Tensor, mask: Tensor | None) -> None:
    if key.is_meta:
        return
    if mask is None:
        fits = not key.any()
    else:
        queries, keys, values = mask.chunk(3)
        fits = bool((queries == 1).all() and (values == 1).all()) and not keys.any()
    if not fits:
        raise WeightsError(f"{name}: keys have a bias or others have none; in timm's DINOv3 only keys have none")
