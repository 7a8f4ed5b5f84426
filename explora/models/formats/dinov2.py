"""Official DINOv2 files (S, B, L, g, registers or none) and its training checkpoints; read and written."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explora.errors import WeightsError
from explora.models.formats.checkpoint import Architecture, Checkpoint, Family, Known, Tensors, architecture, rename
from explora.models.vit import ViT

LICENCE = "Apache-2.0"
_SIZES = (("large", 1024, 24, 16), ("small", 384, 12, 6), ("base", 768, 12, 12))
FAMILY = Family(
    [
        Known(f"vit_{size}_patch14_{kind}dinov2", width, depth, heads, 4 * width, 14, registers)
        for kind, registers in (("", 0), ("reg4_", 4))
        for size, width, depth, heads in _SIZES
    ]
    + [
        Known(f"vit_giant_patch14_{kind}dinov2", 1536, 40, 24, 8192, 14, registers, swiglu=True)
        for kind, registers in (("", 0), ("reg4_", 4))
    ]
)
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_HEADS = re.compile(r"^(dino_head|ibot_head)\.")
_NAMES = {"register_tokens": "reg_token", "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}


def matches(tensors: Tensors) -> bool:
    """Whether the names are those of DINOv2's own code."""
    return any(name.startswith("register_tokens") or ".mlp.w12." in name for name in tensors) or (
        tensors.keys() >= {"mask_token", "pos_embed"} and any(name.endswith(".ls1.gamma") for name in tensors)
    )


def read(tensors: Tensors) -> Checkpoint:
    """Names without prefixes, blocks chunked or not, to ours."""
    found = rename(unchunked(tensors), _NAMES)
    ignored = tuple(name for name in found if _HEADS.match(name))
    ours = fold({name: tensor for name, tensor in found.items() if name not in ignored})
    shaped = replace(infer(ours), sure_of_mean=False) if ignored else infer(ours)
    return Checkpoint("dinov2", shaped, ours, ignored=ignored, licence=LICENCE, inferred=True)


def infer(ours: Tensors, heads: int | None = None) -> Architecture:
    """The architecture; without registers positions are resampled in the official way.

    Weights of other sizes than the released ones, which are for images of 518 px, may come from any images.
    """
    shaped = architecture(ours, FAMILY, heads=heads, positions="timm" if "reg_token" in ours else "official")
    return replace(shaped, sure_of_mean=shaped.image_size == 518 and not shaped.options)


def unchunked(tensors: Tensors) -> dict[str, Tensor]:
    """`blocks.1.6.norm1` to `blocks.6.norm1`: training numbers blocks by chunk and then over the whole depth."""
    found = {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise WeightsError("two chunks hold the same block; these are no DINOv2 training weights")
    return found


def fold(tensors: Tensors) -> dict[str, Tensor]:
    """Add the class token's position to the class token where registers stand between it and the patches.

    timm's register models embed the position of patches alone; `cls_token + pos_embed[:, :1]` is what DINOv2 sums.
    """
    found = dict(tensors)
    if "reg_token" in found and {"pos_embed", "cls_token"} <= found.keys():
        if found["cls_token"].shape != found["pos_embed"][:, :1].shape:
            raise WeightsError("these weights are no DINOv2: its cls_token is as wide as its pos_embed")
        found["cls_token"] = found["cls_token"].float() + found["pos_embed"][:, :1].float()
        found["pos_embed"] = found["pos_embed"][:, 1:]
    return found


def unfolded(vit: ViT) -> dict[str, Tensor]:
    """The state of a ViT with a row for the class token in its positions: zero where the token holds it already."""
    state = dict(vit.state_dict())
    if not vit.embeds_prefix:
        positions = state["pos_embed"]
        state["pos_embed"] = torch.cat([positions.new_zeros(1, 1, vit.width), positions], 1)
    return state


def write(vit: ViT) -> dict[str, Tensor]:
    """The official keys of a plain ViT; with registers the class token holds its position, whose row is zero.

    Raises:
        WeightsError: the model has parts that DINOv2 lacks, or lacks some that it has.
    """
    gate = suits(vit, "DINOv2")
    if any(norm.eps != 1e-6 for norm in vit.modules() if isinstance(norm, nn.LayerNorm)):
        raise WeightsError(f"{vit.name} cannot be written as DINOv2, whose norms have eps 1e-6")
    theirs = {ours: theirs for theirs, ours in _NAMES.items() if gate or "mlp" not in theirs}
    return rename(unfolded(vit), theirs)


_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def suits(vit: ViT, what: str, *, scaled: bool = True) -> bool:
    """Whether the MLP of a model that DINOv2's or the ViT's layout can hold is a gated one.

    Raises:
        WeightsError: parts that are not there or have no place there, other norms or another MLP, registers with
            positions.
    """
    state = vit.state_dict()
    needed = _parts(vit.depth, scaled=scaled)
    strange = [name for name in state if name not in {*needed, "reg_token"}]
    lacking = [name for name in needed if name not in state]
    reasons = [f"has no place for {', '.join(strange[:3])}"] if strange else []
    reasons += [f"needs {', '.join(lacking[:3])}"] if lacking else []
    if other := {type(norm).__name__ for norm in _norms(vit) if not isinstance(norm, nn.LayerNorm)}:
        reasons.append(f"has LayerNorm where this model has {', '.join(sorted(other))}")
    if not reasons:
        block: Any = vit.blocks[0]
        act, gate, x = block.mlp.act, gated(state), torch.linspace(-4, 4, 65, device="cpu")
        if not torch.equal(act(x.clone()), (F.silu if gate else F.gelu)(x)):  # timm has classes of its own for both
            reasons.append(f"has no MLP with {type(act).__name__}")
        if vit.embeds_prefix == ("reg_token" in state):
            reasons.append("has positions for the class token and the patches, never for registers")
    if reasons:
        raise WeightsError(f"{vit.name} cannot be written as {what}, which {' and '.join(reasons)}")
    return gate


def _parts(depth: int, *, scaled: bool) -> list[str]:
    """Names that every such model has; registers may join them."""
    layers = [f"blocks.{block}.{layer}" for block in range(depth) for layer in _LAYERS]
    both = [f"{layer}.{part}" for layer in ("patch_embed.proj", *layers, "norm") for part in ("weight", "bias")]
    scales = [f"blocks.{block}.{scale}.gamma" for block in range(depth * scaled) for scale in ("ls1", "ls2")]
    return ["cls_token", "pos_embed", "mask_token", *both, *scales]


def _norms(vit: ViT) -> list[nn.Module]:
    blocks: Any = vit.blocks
    return [norm for block in blocks for norm in (block.norm1, block.norm2)] + [vit.norm]


def gated(state: Tensors) -> bool:
    """Whether the MLP is a SwiGLU with both halves in one weight."""
    return state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
