"""Vision transformers from timm: images in, tokens out, several crop sizes in one packed pass."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from explora.errors import WeightsError
from explora.models.attention import Group, attend
from explora.models.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup  # noqa: E402
from timm.layers import Attention, PatchEmbed, resample_abs_pos_embed  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

__all__ = ["BlockFeatures", "Mixup", "Tokens", "ViT", "build", "resample_positions", "timm"]


Options = Mapping[str, int | float | bool | str]


@dataclass(frozen=True)
class Tokens:
    """What the final norm puts out for one group of images."""

    cls_BD: Tensor
    """The class token; the mean of the patches where a model has none."""
    patches_BND: Tensor


@dataclass(frozen=True)
class BlockFeatures:
    """What evaluators read: the class token of the last n blocks, each through the final norm."""

    cls: Tensor
    """(B, n, D), the last block last."""
    mean: Tensor
    """(B, D): mean of the last block's patch tokens."""
    patches: Tensor
    """(B, N, D): the last block's patch tokens, row by row."""


class ViT(nn.Module):
    """A timm `VisionTransformer` taken apart: its parameters under timm's own names, plus `mask_token`.

    Args:
        source: the timm model; its modules are adopted, not copied. A classification head is left behind.
        name: timm's name for the architecture, kept for export.
        image_size: side of the images that its position embedding is made for, in pixels.
        options: timm arguments that differ from the named architecture's.

    Raises:
        WeightsError: the architecture has parts that this forward pass does not know.
    """

    def __init__(self, source: VisionTransformer, name: str, image_size: int, options: Options | None = None) -> None:
        super().__init__()
        _plain(source, name)
        self.name = name
        self.options = dict(options or {})
        self.image_size = image_size
        self.width: int = source.embed_dim
        self.depth = len(source.blocks)
        self.patch_size: int = source.patch_embed.patch_size[0]
        self.prefix_tokens: int = source.num_prefix_tokens
        self.embeds_prefix = not source.no_embed_class
        self.mean, self.std = _normalisation(name)
        """Channel mean and std of images in [0, 1] that the architecture's weights expect."""
        self.drop_path = 0.0
        """Probability with which an image skips a residual branch in training, the same for every block."""

        self.cls_token = source.cls_token
        self.reg_token = source.reg_token
        self.pos_embed = source.pos_embed
        self.mask_token = nn.Parameter(torch.zeros(1, self.width))
        self.patch_embed = source.patch_embed
        self.norm_pre = source.norm_pre
        self.blocks = source.blocks
        self.norm = source.norm

    def forward(self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Tokens]:
        """Encode groups of images, one group a size, in one pass.

        Args:
            images: each (B, 3, H, W), sides multiples of the patch size; groups may differ in size.
            masks: for each group None or bool (B, N): patches whose embedding the mask token replaces.
        """
        x, groups = self._pack(images, masks)
        for block in self.blocks:
            x = self._block(block, x, groups)
        return [self._tokens(part) for part in self._unpack(self.norm(x), groups)]

    def features(self, images: Tensor, blocks: int = 1) -> BlockFeatures:
        """Features of (B, 3, H, W) images from the last `blocks` blocks, in fp32."""
        x, groups = self._pack([images], None)
        outputs = []
        for number, block in enumerate(self.blocks):
            x = self._block(block, x, groups)
            if number >= self.depth - blocks:
                outputs.append(self._tokens(self._unpack(self.norm(x), groups)[0]))
        last = outputs[-1].patches_BND.float()
        return BlockFeatures(torch.stack([tokens.cls_BD.float() for tokens in outputs], 1), last.mean(1), last)

    def _pack(self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> tuple[Tensor, list[Group]]:
        embedded = [self._embed(x, mask) for x, mask in zip(images, masks or [None] * len(images), strict=True)]
        groups = [Group(x.shape[0], x.shape[1]) for x in embedded]
        return torch.cat([x.flatten(0, 1) for x in embedded]), groups

    @staticmethod
    def _unpack(x_TD: Tensor, groups: Sequence[Group]) -> list[Tensor]:
        parts = x_TD.split([group.images * group.tokens for group in groups])
        return [part.unflatten(0, tuple(group)) for part, group in zip(parts, groups, strict=True)]

    def _embed(self, images_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        height, width = (side // self.patch_size for side in images_BCHW.shape[-2:])
        x = self.patch_embed.proj(images_BCHW).flatten(2).transpose(1, 2)
        x = self.patch_embed.norm(x).float()  # the residual stream stays fp32 under autocast
        if mask_BN is not None:
            x = torch.where(mask_BN.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            return self.norm_pre(torch.cat([*prefix, x], 1))
        positions = self.positions(height, width)
        x = torch.cat([*prefix, x], 1) + positions if self.embeds_prefix else torch.cat([*prefix, x + positions], 1)
        return self.norm_pre(x)

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding for a grid of `height` x `width` patches: (1, tokens, D), timm's resampling."""
        assert self.pos_embed is not None
        prefix = self.prefix_tokens if self.embeds_prefix else 0
        side = self.image_size // self.patch_size
        return resample_positions(self.pos_embed, (side, side), (height, width), prefix)

    def _tokens(self, x_BTD: Tensor) -> Tokens:
        patches = x_BTD[:, self.prefix_tokens :]
        return Tokens(patches.mean(1) if self.cls_token is None else x_BTD[:, 0], patches)

    def _block(self, block: Any, x_TD: Tensor, groups: Sequence[Group]) -> Tensor:
        x_TD = self._residual(lambda x, g: block.ls1(_attention(block.attn, block.norm1(x), g)), x_TD, groups)
        return self._residual(lambda x, _: block.ls2(block.mlp(block.norm2(x))), x_TD, groups)

    def _residual(self, branch: Any, x_TD: Tensor, groups: Sequence[Group]) -> Tensor:
        """`x + branch(x)`; with drop path the branch runs on a random part of the images of each group only."""
        if not (self.training and self.drop_path > 0):
            return x_TD + branch(x_TD, groups)
        kept = [Group(max(1, round(g.images * (1 - self.drop_path))), g.tokens) for g in groups]
        index, scale, start = [], [], 0
        for group, keep in zip(groups, kept, strict=True):
            images = torch.randperm(group.images, device=x_TD.device)[: keep.images]
            tokens = torch.arange(group.tokens, device=x_TD.device)
            index.append((start + images[:, None] * group.tokens + tokens).flatten())
            scale.append(x_TD.new_full((keep.images * keep.tokens, 1), group.images / keep.images))
            start += group.images * group.tokens
        rows = torch.cat(index)
        return x_TD.index_add(0, rows, (branch(x_TD[rows], kept) * torch.cat(scale)).to(x_TD.dtype))


def _attention(attn: Any, x_TD: Tensor, groups: Sequence[Group]) -> Tensor:
    qkv = attn.qkv(x_TD).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    if not isinstance(attn.q_norm, nn.Identity):
        q, k, v = qkv.unbind(1)
        qkv = torch.stack([attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype), v], 1)
    return attn.proj(attn.norm(attend(qkv, groups).flatten(1)))


def resample_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int) -> Tensor:
    """Bicubic, antialiased (timm's mode) resampling of (1, prefix + h w, D); the prefix rows stay."""
    if old == new:
        return pos_embed
    return resample_abs_pos_embed(pos_embed, list(new), list(old), num_prefix_tokens=prefix)


def build(name: str, image_size: int, options: Options | None = None) -> ViT:
    """A randomly initialised ViT of a timm architecture for square images of `image_size` pixels.

    Raises:
        WeightsError: timm has no such model, it is no plain ViT, or the size does not fit the patches.
    """
    dropped = [option for option in options or {} if "drop" in option]
    if dropped:
        raise WeightsError(f"model.options: {', '.join(dropped)} has no effect here; use objective.drop_path")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models()) or timm.list_models("vit_*")[:3]
        raise WeightsError(f"timm has no model '{name}'; near: {', '.join(near)}")
    source = _create(architecture, image_size, options or {})
    patch = source.patch_embed.patch_size[0]
    if image_size % patch:
        near = [str(size) for size in (image_size // patch * patch, (image_size // patch + 1) * patch) if size]
        raise WeightsError(
            f"image_size {image_size} is no multiple of the patch size {patch} of '{name}'; use {' or '.join(near)}"
        )
    return ViT(source, name, image_size, options)


def _create(architecture: str, image_size: int, options: Options) -> VisionTransformer:
    # fc_norm=False keeps the final norm on the tokens; models that pool the mean would move it behind the pool.
    plain: dict[str, Any] = {"num_classes": 0, "global_pool": "", "fc_norm": False, "img_size": image_size}
    try:
        model = timm.create_model(architecture, pretrained=False, **{**plain, **options})
    except (TypeError, AssertionError) as error:
        raise WeightsError(f"'{architecture}' with {dict(options)} is no plain vision transformer: {error}") from None
    return _plain(model, architecture)


def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    registered = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if registered is None:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(registered.mean), tuple(registered.std)


def _plain(model: nn.Module, name: str) -> VisionTransformer:
    """The model itself, if the forward pass above covers all its parts."""
    if isinstance(model, VisionTransformer) and _known(model):
        return model
    raise WeightsError(
        f"'{name}' ({type(model).__name__}) is more than a plain timm VisionTransformer (vit_*, deit_*, DINOv2, MAE), "
        "the only kind that explora adapts"
    )


def _known(model: VisionTransformer) -> bool:
    # Exact types: a distillation token or a ResNet stem comes as a subclass and would be left out in silence.
    return (
        type(model) is VisionTransformer
        and type(model.patch_embed) is PatchEmbed
        and all(type(b) is Block and type(b.attn) is Attention and b.attn.gate is None for b in model.blocks)
    )
