"""Channel groups (SatMAE, Cong et al. 2022): bands in groups, a token for each group at each patch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from explora.errors import WeightsError
from explora.models.positions import sincos, sincos_grid
from explora.models.torchvision_compat import import_torchvision

import_torchvision()
from timm.layers import PatchEmbed  # noqa: E402

ChannelGroups = tuple[tuple[int, ...], ...]
"""The channels of each group, such as ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))."""

_SHARE = 4
"""A group's own embedding takes this part of the width unless somebody says another: 256 of 1024."""


def check_groups(groups: ChannelGroups, channels: int, width: int, own: int | None = None) -> None:
    """Refuse groups that do not fit a model.

    Args:
        own: width of the group's own embedding where it is not a quarter.

    Raises:
        WeightsError: a channel is in no group or in several, or the width cannot be divided.
    """
    if not all(groups) or sorted(channel for group in groups for channel in group) != list(range(channels)):
        raise WeightsError(
            f"model.channel_groups {[list(group) for group in groups]}: each of the {channels} channels (0 to "
            f"{channels - 1}) must be in one group; model.options.in_chans sets how many channels there are"
        )
    if own is None and width % (4 * _SHARE):
        raise WeightsError(f"model.channel_groups needs a width that is a multiple of {4 * _SHARE}, got {width}")
    if own is not None and (own % 2 or not 0 < own < width or (width - own) % 4):
        raise WeightsError(f"channel_embed is {own} wide, which sines and cosines beside a width of {width} cannot be")


def group_embeds(groups: ChannelGroups, single: PatchEmbed) -> nn.ModuleList:
    """A fresh patch embedding for each group, of the patch size and width of `single`."""
    size, patch = single.img_size, single.patch_size
    width, bias = single.proj.out_channels, single.proj.bias is not None
    embeds = [PatchEmbed(size, patch, len(group), width, bias=bias) for group in groups]
    for embed in embeds:
        nn.init.xavier_uniform_(embed.proj.weight.flatten(1))  # a view: as a linear map, see MAE
    return nn.ModuleList(embeds)


def group_tables(
    groups: ChannelGroups, width: int, side: int, prefix: int, own: int | None = None
) -> tuple[nn.Parameter, nn.Parameter]:
    """`pos_embed` (1, prefix + side * side, D - C), its prefix rows zero, and `channel_embed` (1, G, C): sin-cos.

    Args:
        own: C, a quarter of D unless said otherwise.
    """
    own = own or width // _SHARE
    places = pad(sincos_grid(width - own, side, side), (0, 0, prefix, 0))
    return nn.Parameter(places[None]), nn.Parameter(sincos(own, torch.arange(len(groups)))[None])


def group_positions(places_1NP: Tensor, channel_embed_1GC: Tensor, prefix: int) -> Tensor:
    """(1, prefix + G N, P + C): every place with every group, group by group; prefix rows are of no group."""
    own = channel_embed_1GC[0]
    first, places = places_1NP[:, :prefix], places_1NP[:, prefix:]
    whole = [places.expand(len(own), -1, -1), own[:, None].expand(-1, places.shape[1], -1)]
    return torch.cat([pad(first, (0, own.shape[1])), torch.cat(whole, -1).flatten(0, 1)[None]], 1)


def embed_groups(embeds: Iterable[nn.Module], groups: ChannelGroups, images_BCHW: Tensor) -> Tensor:
    """(B, G N, D): all patches of the first group row by row, then those of the second, and so on."""
    parts = zip(embeds, groups, strict=True)
    return torch.cat([embed_patches(embed, images_BCHW[:, list(group)]) for embed, group in parts], 1)


def embed_patches(embed: nn.Module, images_BCHW: Tensor) -> Tensor:
    """(B, N, D) by timm's `PatchEmbed`, at any size: its own forward takes one size only."""
    assert isinstance(embed, PatchEmbed)
    tokens: Tensor = embed.norm(embed.proj(images_BCHW).flatten(2).transpose(1, 2))
    return tokens


def embed_kept_groups(
    embeds: Iterable[nn.Module], groups: ChannelGroups, images_BCHW: Tensor, keep_BM: Tensor, patches: int
) -> Tensor:
    """(B, M, D): of the tokens that `embed_groups` gives those that are kept, the others never made.

    Args:
        keep_BM: int64, which of the G N.
        patches: N.
    """
    parts = zip(embeds, groups, by_group(keep_BM, len(groups), patches), strict=True)
    made = torch.cat([embed_kept(embed, images_BCHW[:, list(group)], places) for embed, group, places in parts])
    order = (keep_BM // patches).flatten().argsort(stable=True)
    return made[order.argsort()].unflatten(0, keep_BM.shape)


def embed_kept(embed: nn.Module, images_BCHW: Tensor, places_M: Tensor) -> Tensor:
    """(M, D): of what `embed_patches` gives the M patches that are wanted, by their places among all B N.

    Kernels do not overlap, so the convolution is one product with each patch.
    """
    assert isinstance(embed, PatchEmbed)
    cut = kept_patches(images_BCHW, embed.proj.kernel_size[0], places_M).flatten(1)
    tokens: Tensor = embed.norm(linear(cut, embed.proj.weight.flatten(1), embed.proj.bias))
    return tokens


def kept_patches(images_BCHW: Tensor, size: int, places_M: Tensor) -> Tensor:
    """(M, C, p, p): patches of `size` p by their places among all B N, row by row in each image."""
    cut_BYXCPP = images_BCHW.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
    _, rows, columns = cut_BYXCPP.shape[:3]
    return cut_BYXCPP[places_M // (rows * columns), places_M // columns % rows, places_M % columns]


def by_group(tokens_BM: Tensor, groups: int, patches: int) -> list[Tensor]:
    """For each group which of the B N patches are among the tokens, in their order: int64 (M of the group,) each.

    Args:
        tokens_BM: int64, some of the groups * N tokens of each image.
        patches: N.
    """
    images = torch.arange(len(tokens_BM), device=tokens_BM.device).unsqueeze(1)
    places = images * patches + tokens_BM % patches
    if groups == 1:  # their number need not be asked of a device
        return [places.flatten()]
    return [places[tokens_BM // patches == group] for group in range(groups)]
