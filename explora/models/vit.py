"""Vision transformers from timm: images in, tokens out, several crop sizes in one packed pass."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from explora.bands import RGB, Scaling
from explora.errors import WeightsError
from explora.models.attention import Group
from explora.models.blocks import Layout, known, packed
from explora.models.channels import (
    ChannelGroups,
    check_groups,
    embed_groups,
    embed_patches,
    group_embeds,
    group_positions,
    group_tables,
)
from explora.models.positions import PositionMode, resample_positions
from explora.models.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup  # noqa: E402
from timm.layers import PatchEmbed  # noqa: E402
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3  # noqa: E402
from timm.models import is_model_in_modules  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

__all__ = ["BlockFeatures", "Mixup", "Tokens", "ViT", "build", "timm"]


Options = Mapping[str, int | float | bool | str]


class Tokens(NamedTuple):  # a tuple, so that whoever shards a model finds the tensors in what it puts out
    """What the final norm puts out for one group of images."""

    cls_BD: Tensor
    """The class token; the mean of the patches where a model has none."""
    patches_BND: Tensor
    """Row by row; with channel groups all patches of the first group, then those of the second, and so on."""


class BlockFeatures(NamedTuple):
    """What evaluators read: the class token of the last n blocks, each through the final norm."""

    cls: Tensor
    """(B, n, D), the last block last."""
    mean: Tensor
    """(B, D): mean of the last block's patch tokens."""
    patches: Tensor
    """(B, N, D): the last block's patch tokens, in the order of `Tokens.patches_BND`."""


class ViT(nn.Module):
    """A timm `VisionTransformer` or DINOv3 taken apart: parameters under timm's own names, plus `mask_token`.

    Args:
        model: the timm model; its modules are adopted, not copied. A classification head is left behind.
        name: timm's name for the architecture, kept for export.
        image_size: side of the images that its position embedding is made for, in pixels.
        options: timm arguments that differ from the named architecture's.
        positions: how the position embedding is resampled to other sizes.
        channel_groups: channels of each group; `patch_embed` is a list then, and `channel_embed` joins `pos_embed`.
        channel_width: width of `channel_embed`; None: a quarter of the model's, as in SatMAE-L.
        bands: canonical names of the channels; None: red, green, blue where there are three, not known otherwise.

    Raises:
        WeightsError: the architecture has parts that this forward pass does not know, or groups or bands do not fit it.
    """

    entries = ("visible", "features")
    """The methods other than `forward` through which it is entered from outside."""

    def __init__(
        self,
        model: VisionTransformer | Eva,
        name: str,
        image_size: int,
        options: Options | None = None,
        positions: PositionMode = "timm",
        channel_groups: ChannelGroups | None = None,
        channel_width: int | None = None,
        bands: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        _covered(model, name)
        self.name = name
        self.options = dict(options or {})
        self.image_size = image_size
        self.position_mode = positions
        self.channel_groups = channel_groups
        self.width: int = model.embed_dim
        self.depth = len(model.blocks)
        self.patch_size: int = model.patch_embed.patch_size[0]
        self.prefix_tokens: int = model.num_prefix_tokens
        self.embeds_prefix = not model.no_embed_class
        self.channels: int = model.patch_embed.proj.in_channels
        self.groups = len(channel_groups or [()])
        """Tokens at each patch: the number of channel groups."""
        self.bands = _bands(bands, self.channels)
        """Canonical names of the channels in order; None where nobody knows."""
        self.scaling: Scaling | None = None
        """Which values become 0 and 1 before mean and std; None: display levels, or nobody knows."""
        self.mean, self.std = _normalisation(name, self.channels, self.bands)
        """Channel mean and std of images in [0, 1] that the weights expect: the architecture's until one who knows sets
        others."""
        self.drop_path = 0.0
        """Probability with which an image skips a residual branch in training, the same for every block."""
        self.source: Any = None
        """Where the weights came from: set by what reads them."""

        self.cls_token = model.cls_token
        self.reg_token = model.reg_token
        self.pos_embed = model.pos_embed
        self.channel_embed: nn.Parameter | None = None
        self.mask_token = nn.Parameter(torch.zeros(1, self.width))
        self.patch_embed: PatchEmbed | nn.ModuleList = model.patch_embed
        self.rope: Any = model.rope if isinstance(model, Eva) else None
        self.norm_pre = model.norm_pre
        self.blocks = nn.ModuleList([packed(block) for block in model.blocks])
        self.norm = model.norm
        if channel_groups is not None:
            self._group(channel_groups, channel_width)

    def forward(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        class_norms: Sequence[nn.Module | None] | None = None,
    ) -> list[Tokens]:
        """Encode groups of images, one group a size, in one pass.

        Args:
            images: each (B, C, H, W), sides multiples of the patch size; groups may differ in size.
            masks: for each group None or bool (B, groups * N): patches whose embedding the mask token replaces.
            class_norms: for each group None or the LayerNorm that its class token gets instead of the final norm
                (DINOv3's untied norm of local crops).
        """
        x, layout = self._pack(images, masks)
        x = self._run(x, layout)
        norms = class_norms or [None] * len(images)
        parts = zip(self._unpack(x, layout), self._unpack(self.norm(x), layout), norms, strict=True)
        return [self._tokens(normed, None if norm is None else norm(raw[:, 0])) for raw, normed, norm in parts]

    def visible(self, images_BCHW: Tensor, keep_BM: Tensor) -> Tensor:
        """Encode some patches only, each at its place (MAE): (B, prefix + M, D) after the final norm.

        Args:
            keep_BM: int64, which of the groups * N patch tokens to keep; the output has their order.
        """
        x, rope = self._embed(images_BCHW, None), self._rope(*self._grid(images_BCHW))
        prefix = torch.arange(self.prefix_tokens, device=x.device).expand(len(x), -1)
        places = torch.cat([prefix, keep_BM + self.prefix_tokens], 1)
        x = x.gather(1, places.unsqueeze(-1).expand(-1, -1, self.width))
        layout = Layout((Group(*places.shape),), None if rope is None else rope[places].flatten(0, 1))
        x = self._run(x.flatten(0, 1), layout)
        return self._unpack(self.norm(x), layout)[0]

    def features(self, images: Tensor, blocks: int = 1) -> BlockFeatures:
        """Features of (B, C, H, W) images from the last `blocks` blocks, in fp32."""
        x, layout = self._pack([images], None)
        outputs = []
        for number, block in enumerate(self.blocks):
            x = block(x, layout, self._drop())
            if number >= self.depth - blocks:
                outputs.append(self._tokens(self._unpack(self.norm(x), layout)[0]))
        last = outputs[-1].patches_BND.float()
        return BlockFeatures(torch.stack([tokens.cls_BD.float() for tokens in outputs], 1), last.mean(1), last)

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding for a grid of `height` x `width` patches: (1, tokens, D), see `position_mode`."""
        assert self.pos_embed is not None
        prefix = self.prefix_tokens if self.embeds_prefix else 0
        side = self.image_size // self.patch_size
        places = resample_positions(self.pos_embed, (side, side), (height, width), prefix, self.position_mode)
        return places if self.channel_embed is None else group_positions(places, self.channel_embed, prefix)

    def _pack(self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> tuple[Tensor, Layout]:
        embedded = [self._embed(x, mask) for x, mask in zip(images, masks or [None] * len(images), strict=True)]
        groups = tuple(Group(x.shape[0], x.shape[1]) for x in embedded)
        ropes = [self._rope(*self._grid(x)) for x in images]
        turns = [rope.repeat(group.images, 1) for rope, group in zip(ropes, groups, strict=True) if rope is not None]
        return torch.cat([x.flatten(0, 1) for x in embedded]), Layout(groups, torch.cat(turns) if turns else None)

    @staticmethod
    def _unpack(x_TD: Tensor, layout: Layout) -> list[Tensor]:
        parts = x_TD.split([group.images * group.tokens for group in layout.groups])
        return [part.unflatten(0, tuple(group)) for part, group in zip(parts, layout.groups, strict=True)]

    def _run(self, x_TD: Tensor, layout: Layout) -> Tensor:
        for block in self.blocks:
            x_TD = block(x_TD, layout, self._drop())
        return x_TD

    def _drop(self) -> float:
        return self.drop_path if self.training else 0.0

    def _grid(self, images_BCHW: Tensor) -> tuple[int, int]:
        height, width = images_BCHW.shape[-2:]
        return height // self.patch_size, width // self.patch_size

    def _embed(self, images_BCHW: Tensor, mask_BN: Tensor | None) -> Tensor:
        if isinstance(self.patch_embed, nn.ModuleList):
            assert self.channel_groups is not None
            x = embed_groups(self.patch_embed, self.channel_groups, images_BCHW)
        else:
            x = embed_patches(self.patch_embed, images_BCHW)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # the residual stream stays fp32 under autocast
        if mask_BN is not None:
            x = torch.where(mask_BN.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            return self.norm_pre(torch.cat([*prefix, x], 1))
        positions = self.positions(*self._grid(images_BCHW))
        x = torch.cat([*prefix, x], 1) + positions if self.embeds_prefix else torch.cat([*prefix, x + positions], 1)
        return self.norm_pre(x)

    def _rope(self, height: int, width: int) -> Tensor | None:
        """Sines and cosines of one image, (prefix + N, 2 K): prefix tokens are turned by no angle."""
        if self.rope is None:
            return None
        turns: Tensor = self.rope.get_embed((height, width))
        still = turns.new_zeros(self.prefix_tokens, turns.shape[1])
        still[:, turns.shape[1] // 2 :] = 1
        return torch.cat([still, turns])

    def _tokens(self, x_BTD: Tensor, cls_BD: Tensor | None = None) -> Tokens:
        patches = x_BTD[:, self.prefix_tokens :]
        if self.cls_token is None:
            assert cls_BD is None, "no class token to norm"
            return Tokens(patches.mean(1), patches)
        return Tokens(x_BTD[:, 0] if cls_BD is None else cls_BD, patches)

    def _group(self, groups: ChannelGroups, own: int | None) -> None:
        check_groups(groups, self.channels, self.width, own)
        if self.pos_embed is None:
            raise WeightsError(f"model.channel_groups: '{self.name}' has no position embedding to put the groups in")
        assert isinstance(self.patch_embed, PatchEmbed)
        self.patch_embed = group_embeds(groups, self.patch_embed)
        prefix = self.prefix_tokens if self.embeds_prefix else 0
        side = self.image_size // self.patch_size
        self.pos_embed, self.channel_embed = group_tables(groups, self.width, side, prefix, own)


def build(
    name: str,
    image_size: int,
    options: Options | None = None,
    *,
    positions: PositionMode = "timm",
    channel_groups: ChannelGroups | None = None,
    channel_width: int | None = None,
    bands: tuple[str, ...] | None = None,
) -> ViT:
    """A randomly initialised ViT of a timm architecture for square images of `image_size` pixels; see `ViT`.

    Raises:
        WeightsError: timm has no such model, it is no ViT that explora knows, or the size does not fit the patches.
    """
    dropped = [option for option in options or {} if "drop" in option]
    if dropped:
        raise WeightsError(f"model.options: {', '.join(dropped)} has no effect here; use objective.drop_path")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models()) or timm.list_models("vit_*")[:3]
        raise WeightsError(f"timm has no model '{name}'; near: {', '.join(near)}")
    model = _create(architecture, image_size, options or {})
    patch = model.patch_embed.patch_size[0]
    if image_size % patch:
        near = [str(size) for size in (image_size // patch * patch, (image_size // patch + 1) * patch) if size]
        raise WeightsError(
            f"image_size {image_size} is no multiple of the patch size {patch} of '{name}'; use {' or '.join(near)}"
        )
    return ViT(model, name, image_size, options, positions, channel_groups, channel_width, bands)


def _create(architecture: str, image_size: int, options: Options) -> VisionTransformer | Eva:
    # No fc_norm keeps the final norm on the tokens; models that pool the mean would move it behind the pool.
    norm = "use_fc_norm" if is_model_in_modules(architecture, {"eva"}) else "fc_norm"
    plain: dict[str, Any] = {"num_classes": 0, "global_pool": "", norm: False, "img_size": image_size}
    try:
        model = timm.create_model(architecture, pretrained=False, **{**plain, **options})
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        reason = str(error) or f"timm refuses it with {type(error).__name__} and no word why"
        raise WeightsError(f"'{architecture}' with {dict(options)} is no plain vision transformer: {reason}") from None
    return _covered(model, architecture)


def _bands(named: tuple[str, ...] | None, channels: int) -> tuple[str, ...] | None:
    if named is not None and len(named) != channels:
        raise WeightsError(f"model.bands names {len(named)} bands, but the model takes {channels} channels")
    return named or (RGB if channels == len(RGB) else None)


def _normalisation(
    name: str, channels: int, bands: tuple[str, ...] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if bands is None or set(bands) != set(RGB):
        return (0.0,) * channels, (1.0,) * channels
    registered = timm.get_pretrained_cfg(name, allow_unregistered=True)
    known = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if registered is None else (registered.mean, registered.std)
    mean, std = (tuple(each[RGB.index(band)] for band in bands) for each in known)
    return mean, std


def _covered(model: nn.Module, name: str) -> VisionTransformer | Eva:
    """The model itself, if the forward pass above covers all its parts."""
    # Exact types: a distillation token or a ResNet stem comes as a subclass and would be left out in silence.
    if (type(model) is VisionTransformer or (type(model) is Eva and _rotates(model))) and (
        type(model.patch_embed) is PatchEmbed and all(known(block) for block in model.blocks)
    ):
        return model
    raise WeightsError(
        f"'{name}' ({type(model).__name__}) is more than a plain timm VisionTransformer (vit_*, deit_*, DINOv2, MAE) "
        "or DINOv3, the only kinds that explora adapts"
    )


def _rotates(model: Eva) -> bool:
    """Whether its positions are DINOv3's alone, without augmentation."""
    return model.pos_embed is None and type(model.rope) is RotaryEmbeddingDinoV3 and not model.rope.aug_active
