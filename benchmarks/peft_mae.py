"""A training step of MAE as `transformers` (5 or later) and `peft` perform it, to measure ours against.

The same weights, low-rank terms at the same places with the same ranks, and beside them the same parameters learn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from baseline_mae import BETAS, LR, WEIGHT_DECAY, official_name, official_weights
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from explora.adapt.lora import LoRALinear
from explora.objectives import MAE

_PARTS = {"attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after"}
_EMBEDDINGS = {
    "cls_token": "cls_token",
    "pos_embed": "position_embeddings",
    "patch_embed.proj": "patch_embeddings.projection",
}


class PeftMAE:
    """ViTMAE with the weights of an objective of ours, whose low-rank terms are merged for it, and begin anew."""

    def __init__(self, ours: MAE) -> None:
        weights = {name: part for key, tensor in official_weights(ours).items() for name, part in _renamed(key, tensor)}
        model = ViTMAEForPreTraining(_config(ours))
        model.load_state_dict(weights)
        ranks = _ranks(ours)
        self.model: Any = get_peft_model(
            model, LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks, lora_dropout=0.0)
        )
        named = [(name, p) for name, p in ours.named_parameters() if p.requires_grad and ".lora_" not in name]
        learns = {new for name, p in named for new, _ in _renamed(official_name(name), p)}
        for name, p in self.model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            p.requires_grad_(".lora_" in name or plain in learns)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, foreach=True)

    def loss(self, batch: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Of one batch, in fp32 or under autocast to `dtype`."""
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found: Tensor = self.model(pixel_values=batch["image"], noise=batch["noise"]).loss
        return found

    def step(self, batch: Mapping[str, Tensor], dtype: torch.dtype) -> float:
        """One step of training."""
        loss = self.loss(batch, dtype)
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        self.adamw.step()
        return loss.item()


def _config(ours: MAE) -> ViTMAEConfig:
    backbone, decoder = ours.backbone, ours.decoder
    first: Any = backbone.blocks[0]
    inner: Any = decoder.blocks[0]
    width = decoder.embed.out_features
    return ViTMAEConfig(
        hidden_size=backbone.width,
        num_hidden_layers=backbone.depth,
        num_attention_heads=first.attn.num_heads,
        intermediate_size=first.mlp.fc1.out_features,
        layer_norm_eps=1e-6,
        image_size=backbone.image_size,
        patch_size=backbone.patch_size,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=len(decoder.blocks),
        decoder_num_attention_heads=inner.attn.num_heads,
        decoder_intermediate_size=inner.mlp.fc1.out_features,
        mask_ratio=ours.config.mask_ratio,
        norm_pix_loss=True,
    )


def _renamed(official: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of the official model under the names of ViTMAE, where queries, keys and values stand apart."""
    block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.*)\.(weight|bias)", official)
    if block is None:
        part, _, kind = official.rpartition(".")
        if official.startswith("norm."):
            return [(f"vit.layernorm.{kind}", tensor)]
        if official == "mask_token" or official.startswith("decoder_"):
            return [(f"decoder.{official}", tensor)]
        where = f"vit.embeddings.{_EMBEDDINGS[part or official]}"
        return [(f"{where}.{kind}" if part else where, tensor)]
    decoder, number, part, kind = block.groups()
    layer = f"decoder.decoder_layers.{number}" if decoder else f"vit.layers.{number}"
    if part == "attn.qkv":
        return [
            (f"{layer}.attention.{name}_proj.{kind}", each) for name, each in zip("qkv", tensor.chunk(3), strict=True)
        ]
    return [(f"{layer}.{_PARTS.get(part, part)}.{kind}", tensor)]


def _ranks(ours: MAE) -> dict[str, int]:
    """ViTMAE's layers that have low-rank terms, and their ranks; alpha is the rank."""
    found = {}
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            places = _renamed(official_name(f"{name}.weight"), layer.weight)
            found |= {places[part][0].removesuffix(".weight"): layer.rank for part in layer.parts}
    return found
