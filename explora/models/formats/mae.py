"""Official MAE files (encoder, encoder with decoder, fine-tuned), and SatMAE's with channel groups."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from explora.models.formats.checkpoint import (
    Architecture,
    Checkpoint,
    Family,
    Known,
    Tensors,
    architecture,
    pooled,
    shape,
)

LICENCE = "CC-BY-NC-4.0"
FAMILY = Family(
    [
        Known("vit_base_patch16_224.mae", 768, 12, 12, 3072, 16, layer_scale=False),
        Known("vit_large_patch16_224.mae", 1024, 24, 16, 4096, 16, layer_scale=False),
        Known("vit_huge_patch14_224.mae", 1280, 32, 16, 5120, 14, layer_scale=False),
    ]
)
_DECODER = re.compile(r"^decoder_")
_OFFICIAL = re.compile(r"^mae_(pretrain|visualize|finetuned?)_")
"""How official files are called."""
_GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
"""SatMAE's groups of the ten Sentinel-2 bands that it keeps; a file holds only how many bands each group has."""


def matches(tensors: Tensors, wrapper: str | None) -> bool:
    """Whether a plain ViT is an MAE: a decoder, its fixed positions (no class row), or its wrapper and no usual head.

    Args:
        wrapper: the outer key of a .pth file, `model` in official ones.
    """
    if "decoder_embed.weight" in tensors or "channel_embed" in tensors:
        return True
    if any(name.endswith((".ls1.gamma", ".gamma_1")) for name in tensors) or "reg_token" in tensors:
        return False
    if "norm_pre.weight" in tensors or "cls_token" not in tensors:
        return False
    finetuned = "fc_norm.weight" in tensors and "norm.weight" not in tensors
    if wrapper == "model" and (finetuned or "head.weight" not in tensors):
        return True
    return _fixed(tensors)


def read(tensors: Tensors, file: str = "") -> Checkpoint:
    """The encoder under our names, the decoder apart; `fc_norm` of a fine-tuned file stands in for the final norm.

    Args:
        file: its name; others than official ones may have been trained on other images, or be no MAE at all.
    """
    decoder = {name: tensor for name, tensor in tensors.items() if _DECODER.match(name)}
    found = {name: tensor for name, tensor in tensors.items() if name not in decoder}
    if decoder and "mask_token" in found:
        decoder["decoder_mask_token"] = found.pop("mask_token")
    found, notes = pooled(found)
    shaped = grouped(found) if "channel_embed" in found else architecture(found, FAMILY)
    ignored: tuple[str, ...] = ()
    if "channel_cls_embed" in found and not found["channel_cls_embed"].any():
        del found["channel_cls_embed"]  # the class token belongs to no group, in our model as in SatMAE's encoder
        ignored = ("channel_cls_embed",)
    official = _OFFICIAL.match(file) is not None
    guesses = shaped.guesses
    if not (official or decoder or "channel_embed" in found):
        mark = "its fixed sin-cos positions" if _fixed(found) else "its outer key `model`"
        guesses = (*guesses, f"taken for an MAE by {mark}; give model.name if it is another plain ViT")
    shaped = replace(shaped, sure_of_mean=official, guesses=guesses)
    return Checkpoint("mae", shaped, found, decoder, None, ignored, LICENCE, inferred=True, notes=notes)


def grouped(tensors: Tensors) -> Architecture:
    """The architecture of SatMAE's group-channel MAE.

    Groups of other sizes than SatMAE's stay unknown; `model.channel_groups` must say them.
    """
    count = shape(tensors, "channel_embed", 3)[1]
    convs = [shape(tensors, f"patch_embed.{group}.proj.weight", 4) for group in range(count)]
    width, _, patch, _ = convs[0]
    channels = sum(conv[1] for conv in convs)
    one = torch.empty(width, channels, patch, patch, device="meta")
    shaped = architecture({**tensors, "patch_embed.proj.weight": one}, FAMILY)
    groups = _GROUPS if [conv[1] for conv in convs] == [len(group) for group in _GROUPS] else None
    return replace(shaped, channel_groups=groups)


def _fixed(tensors: Tensors) -> bool:
    """Whether positions are MAE's sine and cosine, whose row for the class token is zero; learnt ones never are."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.dim() != 3 or positions.is_meta:
        return False
    return bool(positions.any()) and not positions[:, 0].any()
