"""Hugging Face files of Dinov2Model, Dinov2WithRegistersModel, ViTMAE and ViT; read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from explora.errors import WeightsError
from explora.models.formats import dinov2, mae, timm
from explora.models.formats.checkpoint import (
    UNKNOWN,
    Architecture,
    Checkpoint,
    Scale,
    Tensors,
    architecture,
    rename,
    scale,
    setting,
)
from explora.models.vit import ViT

_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "layernorm": "norm",
}
_ATTENTION = {"attention.attention.qkv": "attn.qkv", "attention.output.dense": "attn.proj"}
_DINOV2 = {
    **_OUTER,
    **_ATTENTION,
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
}
_VIT = {
    **_OUTER,
    **_ATTENTION,
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_DECODER = {
    "decoder.mask_token": "decoder_mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
    "decoder.decoder_layers": "decoder_blocks",
    "decoder.decoder_encoder.layer": "decoder_blocks",
    **{theirs: ours for theirs, ours in _VIT.items() if theirs not in _OUTER},
}
_CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "vit": "ViTModel"}
"""What is written, by model type."""
_KINDS = (*_CLASSES, "vit_mae")
_PREFIX = re.compile(r"^(dinov2_with_registers|dinov2|vit)\.")
_IGNORED = re.compile(r"^(pooler|classifier)\.")
_THIRD = re.compile(r"attention\.attention\.(query|key|value)\.")
_LICENCES = {"dinov2": dinov2.LICENCE, "dinov2_with_registers": dinov2.LICENCE, "vit_mae": mae.LICENCE}


def matches(tensors: Tensors) -> bool:
    """Whether the names are those of these four models."""
    return any("embeddings.patch_embeddings.projection." in name for name in tensors)


def read(
    tensors: Tensors, config: Mapping[str, Any] | None = None, preprocessor: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Names of `transformers` to ours; heads come from config.json, or from the width where there is none.

    Args:
        preprocessor: preprocessor_config.json, which has mean and std.

    Raises:
        WeightsError: another model type, or a setting that our forward pass does not have.
    """
    short = {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    kind = _kind(short) if config is None else setting(config, "model_type", str)
    if kind not in _KINDS:
        raise WeightsError(f"config.json: model_type '{kind}' is not read; known: {', '.join(_KINDS)}")
    notes, heads = _settings(config) if config is not None else ((), None)
    ignored = tuple(name for name in short if _IGNORED.match(name))
    decoder = {name: tensor for name, tensor in short.items() if name.startswith("decoder.")}
    found = {name: tensor for name, tensor in short.items() if name not in ignored and name not in decoder}
    scaled = kind.startswith("dinov2")
    ours = rename(_fused(found), _DINOV2 if scaled else _VIT)
    if "mask_token" in ours:
        ours["mask_token"] = ours["mask_token"].flatten(0, -2)
    if scaled:
        ours = dinov2.fold(ours)
        shaped = dinov2.infer(ours, heads)
    else:
        shaped = architecture(ours, mae.FAMILY if kind == "vit_mae" else timm.PLAIN, heads=heads)
        shaped = replace(shaped, sure_of_mean=False)
    mean, std = _scale(preprocessor or {}, shaped)
    return Checkpoint(
        f"huggingface/{kind}",
        replace(shaped, mean=mean, std=std, sure_of_mean=shaped.sure_of_mean or mean is not None),
        ours,
        decoder=rename(_fused(decoder), _DECODER),
        decoder_heads=None if config is None or not decoder else setting(config, "decoder_num_attention_heads", int),
        ignored=ignored,
        licence=_LICENCES.get(kind, UNKNOWN),
        inferred=kind in _LICENCES,
        notes=notes,
    )


def write(vit: ViT) -> dict[str, Tensor]:
    """The keys of the class that `config` names; `mask_token` is left out where that class has none.

    Raises:
        WeightsError: no class of `transformers` has all parts of this model.
    """
    scaled = _fitting(vit) != "vit"
    state = dinov2.unfolded(vit)
    if not scaled:
        del state["mask_token"]
    table = {ours: theirs for theirs, ours in (_DINOV2 if scaled else _VIT).items()}
    if scaled and not dinov2.gated(state):
        del table["mlp.fc1"], table["mlp.fc2"]
    found: dict[str, Tensor] = {}
    for name, tensor in rename(state, table).items():
        if "attention.qkv." in name:
            thirds = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            found |= {name.replace("qkv", third): part.clone() for third, part in thirds}
        else:
            found[name] = tensor
    return found


def config(vit: ViT) -> dict[str, Any]:
    """The config.json with which `AutoModel` rebuilds a model that `write` has written.

    Raises:
        WeightsError: see `write`.
    """
    kind = _fitting(vit)
    block: Any = vit.blocks[0]
    hidden: int = block.mlp.fc2.weight.shape[1]
    common = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": block.attn.num_heads,
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "num_channels": vit.channels,
        "hidden_act": "gelu",
        "layer_norm_eps": vit.norm.eps,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
    }
    if kind == "vit":
        return {**common, "intermediate_size": hidden}
    gated = dinov2.gated(vit.state_dict())
    registers = {"num_register_tokens": vit.prefix_tokens - 1} if vit.reg_token is not None else {}
    return {
        **common,
        **registers,
        "mlp_ratio": _gated_ratio(vit, hidden) if gated else _whole(hidden, vit.width),
        "use_swiglu_ffn": gated,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "apply_layernorm": True,
        "reshape_hidden_states": True,
        "use_mask_token": True,
    }


def _fitting(vit: ViT) -> str:
    """The model type that holds every part of a ViT."""
    names = vit.state_dict().keys()
    scaled = "blocks.0.ls1.gamma" in names
    kind = "vit" if not scaled else "dinov2_with_registers" if "reg_token" in names else "dinov2"
    what = f"a Hugging Face {_CLASSES[kind]}"
    gated = dinov2.suits(vit, what, scaled=scaled)
    if not scaled and (gated or "reg_token" in names):
        raise WeightsError(f"{vit.name} cannot be written as {what}, which has no gated MLP and no registers")
    if any(norm.eps != vit.norm.eps for norm in vit.modules() if isinstance(norm, nn.LayerNorm)):
        raise WeightsError(f"{vit.name} cannot be written as {what}: its norms differ in eps")
    return kind


def _whole(hidden: int, width: int) -> int:
    if hidden % width:
        raise WeightsError(f"Hugging Face's DINOv2 has an MLP of a whole number of widths, not {hidden} beside {width}")
    return hidden // width


def _gated_ratio(vit: ViT, hidden: int) -> int:
    for ratio in range(1, 17):
        if (int(vit.width * ratio * 2 / 3) + 7) // 8 * 8 == hidden:
            return ratio
    raise WeightsError(f"{vit.name}: Hugging Face's SwiGLU has no hidden width {hidden} beside a width of {vit.width}")


def _kind(tensors: Tensors) -> str:
    if "embeddings.register_tokens" in tensors:
        return "dinov2_with_registers"
    if any(name.endswith("layer_scale1.lambda1") for name in tensors):
        return "dinov2"
    return "vit_mae" if any(name.startswith("decoder.") for name in tensors) else "vit"


def _scale(preprocessor: Mapping[str, Any], shaped: Architecture) -> tuple[Scale | None, Scale | None]:
    if preprocessor.get("do_normalize") is False:
        channels = int(shaped.options.get("in_chans", 3))
        return (0.0,) * channels, (1.0,) * channels
    return scale(preprocessor, "image_mean", "image_std")


def _settings(config: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Notes and the number of heads; what our forward pass would compute otherwise is refused."""
    act = config.get("hidden_act", "gelu")
    if act != "gelu":
        raise WeightsError(f"config.json: hidden_act '{act}' is not read; explora's backbones have gelu")
    eps = config.get("layer_norm_eps", 1e-6)
    notes = () if eps == 1e-6 else (f"config.json has layer_norm_eps {eps:g}, timm's architecture 1e-06",)
    return notes, setting(config, "num_attention_heads", int)


def _fused(tensors: Tensors) -> dict[str, Tensor]:
    """Query, key and value as one `qkv`; a layer that lacks one of them keeps the others, to be named as left over."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        third = _THIRD.search(name)
        if third is None:
            found[name] = tensor
            continue
        names = [_THIRD.sub(f"attention.attention.{one}.", name) for one in ("query", "key", "value")]
        if third[1] == "query" and all(one in tensors for one in names):
            found[name.replace(".query.", ".qkv.")] = torch.cat([tensors[one] for one in names])
        elif not all(one in tensors for one in names):
            found[name] = tensor
    return found
