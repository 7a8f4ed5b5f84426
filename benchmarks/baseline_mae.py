"""MAE's training step as its official code performs it, on timm's blocks: what ours is measured against.

Written from the algorithm of facebookresearch/mae (`MaskedAutoencoderViT`): all patches are embedded and the visible
ones gathered, the decoder predicts every token, the loss is made of all patches and masked afterwards; all parameters
learn but for the positions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from explora.adapt.places import Adopted
from explora.models.vit import timm
from explora.objectives import MAE

Block = timm.models.vision_transformer.Block
LR, WEIGHT_DECAY, BETAS = 1e-4, 0.05, (0.9, 0.95)
FIXED = ("pos_embed", "decoder_pos_embed")
UNUSED = "encoder_mask_token"


class OfficialMAE(nn.Module):
    """Encoder and decoder with the weights of an objective of ours, whose low-rank terms are merged for it.

    Args:
        ours: an objective without channel groups, on a plain ViT with a class token.
    """

    def __init__(self, ours: MAE) -> None:
        super().__init__()
        backbone, decoder = ours.backbone, ours.decoder
        assert len(decoder.channels) == 1
        options: dict[str, Any] = {**backbone.options, "img_size": backbone.image_size, "num_classes": 0}
        model: Any = timm.create_model(backbone.name, **options)
        self.patch_embed, self.blocks, self.norm = model.patch_embed, model.blocks, model.norm
        self.cls_token, self.pos_embed = model.cls_token, model.pos_embed
        width, heads = decoder.embed.out_features, cast(Any, decoder.blocks[0]).attn.num_heads
        self.decoder_embed = nn.Linear(backbone.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros_like(decoder.pos_embed))
        self.decoder_blocks = nn.ModuleList([Block(width, heads, qkv_bias=True) for _ in decoder.blocks])
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, cast(nn.Linear, decoder.pred).out_features)
        self.patch, self.mask_ratio = backbone.patch_size, ours.config.mask_ratio
        self.load_state_dict(official_weights(ours))
        for name, p in self.named_parameters():
            p.requires_grad_(name not in FIXED)
        learnt = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decays = [p for p in learnt.values() if p.ndim > 1]
        groups = [
            {"params": decays, "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in learnt.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=LR, betas=BETAS, foreach=True)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """The loss: squared errors of normalised patches, the mean over each, then over the hidden ones."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, mask, restore = self._masked(x, noise)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        predicted = self._decoded(self.norm(x), restore)
        target = self._patchify(images)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
        loss = ((predicted - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()

    def step(self, batch: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> float:
        """One step of training in fp32, or under autocast to `dtype`: the loss."""
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = self(batch["image"], batch["noise"])
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        self.adamw.step()
        return loss.item()

    @torch.no_grad()
    def gradients(self, ours: MAE) -> dict[str, Tensor]:
        """From those of the merged weights W + s B A here what the gradients of all that learns in ours must be."""
        whole = {name: p.grad for name, p in self.named_parameters()}
        found = {}
        for name, p in ours.named_parameters():
            if not p.requires_grad:
                continue
            layer, _, last = name.rpartition(".")
            if last not in ("lora_a", "lora_b"):
                found[name] = cast(Tensor, whole[official_name(name)])
                continue
            low: Any = ours.get_submodule(layer)  # s B^T dW and s dW A^T, piece by piece
            pieces = cast(Tensor, whole[official_name(f"{layer}.weight")]).chunk(low.pieces)
            terms = zip(low.parts, low.lora_a.chunk(len(low.parts)), low.lora_b, strict=True)
            parts = [pieces[at] @ a.T if last == "lora_b" else b.T @ pieces[at] for at, a, b in terms]
            found[name] = low.scale * (torch.stack(parts) if last == "lora_b" else torch.cat(parts))
        return found

    def _masked(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The visible tokens, 1 where a token is hidden, and how shuffled tokens go back."""
        images, tokens, width = x.shape
        kept = int(tokens * (1 - self.mask_ratio))
        shuffled = noise.argsort(1)
        restore = shuffled.argsort(1)
        x = torch.gather(x, 1, shuffled[:, :kept].unsqueeze(-1).repeat(1, 1, width))
        mask = torch.ones(images, tokens)
        mask[:, :kept] = 0
        return x, mask.gather(1, restore), restore

    def _decoded(self, x: Tensor, restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        masks = self.mask_token.repeat(len(x), restore.shape[1] + 1 - x.shape[1], 1)
        patches = torch.cat([x[:, 1:], masks], 1)
        patches = torch.gather(patches, 1, restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def _patchify(self, images: Tensor) -> Tensor:
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        x = images.reshape(len(images), 3, rows, self.patch, columns, self.patch)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(len(images), rows * columns, -1)


def official_weights(ours: MAE) -> dict[str, Tensor]:
    """The tensors of encoder and decoder under official names, low-rank terms merged."""
    merged = copy.deepcopy(ours)
    merged.method.merge(merged.backbone)
    for block in cast(Any, merged.decoder.blocks):
        if isinstance(block.attn.qkv, Adopted):
            block.attn.qkv = block.attn.qkv.merged()
    names = {official_name(name): p.detach() for name, p in merged.named_parameters()}
    return {name: p for name, p in names.items() if name != UNUSED}


def official_name(ours: str) -> str:
    """Of a parameter of our objective."""
    _, part, name = ours.split(".", 2)
    if part == "backbone":
        return UNUSED if name == "mask_token" else name
    return name if name == "mask_token" else f"decoder_{name}"
