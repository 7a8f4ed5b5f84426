"""Vision transformers from timm: images in, tokens out, several crop sizes in one packed pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from explora.bands import Scaling
from explora.errors import WeightsError
from explora.models.architecture import Options, bands_of, covered, create, normalisation
from explora.models.attention import Group
from explora.models.blocks import Layout, packed, pieces, through
from explora.models.channels import (
    ChannelGroups,
    by_group,
    check_groups,
    embed_groups,
    embed_kept,
    embed_kept_groups,
    embed_patches,
    group_embeds,
    group_positions,
    group_tables,
)
from explora.models.positions import PositionMode, resample_positions
from explora.models.tokens import BlockFeatures, Tokens, rows
from explora.models.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402
from timm.data import Mixup  # noqa: E402
from timm.layers import PatchEmbed  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

__all__ = ["BlockFeatures", "Mixup", "Tokens", "ViT", "build", "timm"]


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

    bands: tuple[str, ...] | None
    """Canonical names of the channels in order; None where nobody knows."""
    mean: tuple[float, ...]
    """Channel mean of images in [0, 1] that the weights expect: the architecture's until one who knows sets another."""
    std: tuple[float, ...]
    """Their standard deviation."""
    scaling: Scaling | None
    """Which values become 0 and 1 before mean and std; None: display levels, or nobody knows."""
    drop_path: float
    """Probability with which an image skips a residual branch in training, the same for every block."""
    source: Any
    """Where the weights came from: set by what reads them."""
    additions: dict[str, dict[str, Any]]
    """Settings of the extensions that are on it, by name; `explora.models.extensions` puts them on."""
    inherited: frozenset[str]
    """Those of them that its weights came with: a part of the source, which no method takes off."""
    pool: Any
    """What makes the class token of all that the blocks' readers have found; None in a plain ViT."""

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
        covered(model, name)
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
        self.bands = bands_of(bands, self.channels)
        self.scaling = None
        self.mean, self.std = normalisation(name, self.channels, self.bands)
        self.drop_path = 0.0
        self.source = None
        self.additions = {}
        self.inherited = frozenset()

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
        self.pool = None
        if channel_groups is not None:
            self._group(channel_groups, channel_width)

    def forward(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        class_norms: Sequence[nn.Module | None] | None = None,
        wanted: Sequence[Tensor | None] | None = None,
    ) -> list[Tokens]:
        """Encode groups of images, one group a size, in one pass.

        Args:
            images: each (B, C, H, W), sides multiples of the patch size; groups may differ in size.
            masks: for each group None or bool (B, groups * N): patches whose embedding the mask token replaces.
            class_norms: for each group None or the LayerNorm that its class token gets instead of the final norm
                (DINOv3's untied norm of local crops).
            wanted: for each group None or int64 (M,): which of its B * groups * N patch tokens to put out, in this
                order. The last block leaves out what nobody wants.
        """
        x, layout = self._pack(images, masks)
        wanted = wanted or [None] * len(images)
        if all(places is None for places in wanted) or self.cls_token is None or self.pool is not None:
            (x,), read = self._read(x, layout)
            tokens = self._tokens(x, layout, read, class_norms)
            return [whole.chosen(places) for whole, places in zip(tokens, wanted, strict=True)]
        return self._chosen(x, layout, wanted, class_norms)

    def visible(self, images_BCHW: Tensor, keep_BM: Tensor) -> Tensor:
        """Encode some patches only, each at its place (MAE): (B, prefix + M, D) after the final norm.

        Args:
            keep_BM: int64, which of the groups * N patch tokens to keep; the output has their order.
        """
        x, rope = self._embed(images_BCHW, None, keep_BM), self._rope(*self._grid(images_BCHW))
        turns = None if rope is None else rope[_behind(self.prefix_tokens, keep_BM)].flatten(0, 1)
        layout = Layout((Group(*x.shape[:2]),), turns)
        x = self._run(x.flatten(0, 1), layout)
        return self._unpack(self.norm(x), layout)[0]

    def features(self, images: Tensor, blocks: int = 1) -> BlockFeatures:
        """Features of (B, C, H, W) images from the last `blocks` blocks, in fp32."""
        x, layout = self._pack([images], None)
        (*earlier, x), read = self._read(x, layout, blocks)
        outputs = [self._tokens(stream, layout)[0] for stream in earlier] + self._tokens(x, layout, read)
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

    def _run(self, x_TD: Tensor, layout: Layout, rows_R: Tensor | None = None) -> Tensor:
        """The stream after all blocks, or of it the rows that are wanted."""
        *earlier, last = self.blocks
        return last(through(earlier, x_TD, layout, self._drop()), layout, self._drop(), None, rows_R)

    def _read(self, x_TD: Tensor, layout: Layout, last: int = 1) -> tuple[list[Tensor], list[Tensor]]:
        """The stream after each of the last blocks, and what readers found at each block, if there are any."""
        cut = pieces(self.blocks, x_TD, layout, self._drop())
        found = [self._read_piece(part, piece, last) for part, piece in cut]
        if len(found) == 1:
            return found[0]
        streams, read = ([torch.cat(parts) for parts in zip(*lists, strict=True)] for lists in zip(*found, strict=True))
        return streams, read

    def _read_piece(self, x_TD: Tensor, layout: Layout, last: int) -> tuple[list[Tensor], list[Tensor]]:
        streams: list[Tensor] = []
        read: list[Tensor] = []
        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            heads = None
            if self.pool is not None:
                found, heads = block.read(x_TD, layout, read[-1] if read else None)
                read.append(found)
            x_TD = block(x_TD, layout, self._drop(), heads)
            if number >= self.depth - last:
                streams.append(x_TD)
        return streams, read

    def _drop(self) -> float:
        return self.drop_path if self.training else 0.0

    def _grid(self, images_BCHW: Tensor) -> tuple[int, int]:
        height, width = images_BCHW.shape[-2:]
        return height // self.patch_size, width // self.patch_size

    def _embed(self, images_BCHW: Tensor, mask_BN: Tensor | None, keep_BM: Tensor | None = None) -> Tensor:
        x = self._patches(images_BCHW, keep_BM)
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # the residual stream stays fp32 under autocast
        if mask_BN is not None:
            x = torch.where(mask_BN.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if self.pos_embed is None:
            return self.norm_pre(torch.cat([*prefix, x], 1))
        positions = self.positions(*self._grid(images_BCHW))
        if keep_BM is not None:
            positions = positions[0, _behind(self.prefix_tokens if self.embeds_prefix else 0, keep_BM)]
        x = torch.cat([*prefix, x], 1) + positions if self.embeds_prefix else torch.cat([*prefix, x + positions], 1)
        return self.norm_pre(x)

    def _patches(self, images_BCHW: Tensor, keep_BM: Tensor | None) -> Tensor:
        """The embedding of all patches, or of those that are kept."""
        embed = self.patch_embed
        if isinstance(embed, nn.ModuleList):
            assert self.channel_groups is not None
            if keep_BM is None:
                return embed_groups(embed, self.channel_groups, images_BCHW)
            return embed_kept_groups(embed, self.channel_groups, images_BCHW, keep_BM, prod(self._grid(images_BCHW)))
        if keep_BM is None:
            return embed_patches(embed, images_BCHW)
        (places,) = by_group(keep_BM, 1, prod(self._grid(images_BCHW)))
        return embed_kept(embed, images_BCHW, places).unflatten(0, keep_BM.shape)

    def _rope(self, height: int, width: int) -> Tensor | None:
        """Sines and cosines of one image, (prefix + N, 2 K): prefix tokens are turned by no angle."""
        if self.rope is None:
            return None
        turns: Tensor = self.rope.get_embed((height, width))
        still = turns.new_zeros(self.prefix_tokens, turns.shape[1])
        still[:, turns.shape[1] // 2 :] = 1
        return torch.cat([still, turns])

    def _tokens(
        self,
        x_TD: Tensor,
        layout: Layout,
        read: Sequence[Tensor] = (),
        class_norms: Sequence[nn.Module | None] | None = None,
    ) -> list[Tokens]:
        """The stream through the final norm, group by group; the class token through its own norm where it has one."""
        raw, normed = self._unpack(x_TD, layout), self._unpack(self.norm(x_TD), layout)
        patches = [part[:, self.prefix_tokens :] for part in normed]
        norms = class_norms or [None] * len(raw)
        if self.cls_token is None:
            assert not any(norms), "no class token to norm"
            return [Tokens(part.mean(1), part) for part in patches]
        classes = [part[:, 0] for part in raw]
        if read:
            classes = self.pool(classes, read)
            norms = [self.pool.norm if norm is None else norm for norm in norms]
        ends = zip(classes, norms, normed, strict=True)
        finished = [whole[:, 0] if norm is None else norm(cls) for cls, norm, whole in ends]
        return [Tokens(cls, part) for cls, part in zip(finished, patches, strict=True)]

    def _chosen(
        self,
        x_TD: Tensor,
        layout: Layout,
        wanted: Sequence[Tensor | None],
        class_norms: Sequence[nn.Module | None] | None,
    ) -> list[Tokens]:
        """Class tokens and some patches through the blocks and the final norm, as `_tokens` gives all of them."""
        chosen = rows(layout.groups, wanted, self.prefix_tokens, x_TD.device)
        x = self._run(x_TD, layout, torch.cat(chosen))
        raw, normed = (part.split([len(some) for some in chosen]) for part in (x, self.norm(x)))
        tokens = []
        for number, (group, some) in enumerate(zip(layout.groups, wanted, strict=True)):
            norm = class_norms[number] if class_norms else None
            cls = normed[2 * number] if norm is None else norm(raw[2 * number])
            patches = normed[2 * number + 1]
            tokens.append(Tokens(cls, patches.unflatten(0, (group.images, -1)) if some is None else patches))
        return tokens

    def _group(self, groups: ChannelGroups, own: int | None) -> None:
        check_groups(groups, self.channels, self.width, own)
        if self.pos_embed is None:
            raise WeightsError(f"model.channel_groups: '{self.name}' has no position embedding to put the groups in")
        assert isinstance(self.patch_embed, PatchEmbed)
        self.patch_embed = group_embeds(groups, self.patch_embed)
        prefix = self.prefix_tokens if self.embeds_prefix else 0
        side = self.image_size // self.patch_size
        self.pos_embed, self.channel_embed = group_tables(groups, self.width, side, prefix, own)


def _behind(prefix: int, keep_BM: Tensor) -> Tensor:
    """Rows of a table of all tokens of an image, (B, prefix + M): those before the patches, then the kept ones."""
    first = torch.arange(prefix, device=keep_BM.device).expand(len(keep_BM), -1)
    return torch.cat([first, keep_BM + prefix], 1)


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
    model = create(name, image_size, options or {})
    patch = model.patch_embed.patch_size[0]
    if image_size % patch:
        near = [str(size) for size in (image_size // patch * patch, (image_size // patch + 1) * patch) if size]
        raise WeightsError(
            f"image_size {image_size} is no multiple of the patch size {patch} of '{name}'; use {' or '.join(near)}"
        )
    return ViT(model, name, image_size, options, positions, channel_groups, channel_width, bands)
