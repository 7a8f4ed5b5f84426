"""Channel groups against SatMAE written out in a few lines, and the published parameter count."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.testing import assert_close

from explora.adapt import ExPLoRA, adapt
from explora.adapt.lora import LoRALinear
from explora.errors import WeightsError
from explora.models import ViT, build

NAME = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
GROUPS = ((0, 4, 2), (1,), (3, 5))
SENTINEL = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
VARIANTS = {
    "class token": {},
    "no class token": {"class_token": False},
    "registers": {"reg_tokens": 3, "init_values": 0.5},
    "positions of patches alone": {"no_embed_class": True, "reg_tokens": 2},
}


def grouped(**options) -> ViT:
    torch.manual_seed(0)
    vit = build(NAME, 32, {**TINY, "in_chans": 6, **options}, channel_groups=GROUPS)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "_embed" not in name or "patch" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def vit(request) -> ViT:
    return grouped(**request.param)


def wave(width: int, place: int) -> list[float]:
    """SatMAE's sin-cos of one place: `width` numbers."""
    angles = [place / 10_000 ** (2 * i / width) for i in range(width // 2)]
    return [*map(math.sin, angles), *map(math.cos, angles)]


def satmae(vit: ViT, images: Tensor) -> Tensor:
    """Embedded tokens of 32-pixel images, one patch of one group at a time."""
    tokens = []
    for number, group in enumerate(GROUPS):
        conv = vit.patch_embed[number].proj
        for y in range(4):
            for x in range(4):
                cut = images[:, group, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                place = torch.tensor([*wave(12, x), *wave(12, y), *wave(8, number)])
                tokens.append(torch.einsum("bchw,dchw->bd", cut, conv.weight) + conv.bias + place)
    prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
    first = torch.cat([*prefix, torch.zeros(1, 0, 32)], 1)
    return torch.cat([first.expand(len(images), -1, -1), torch.stack(tokens, 1)], 1)


def through_blocks(vit: ViT, x_BTD: Tensor) -> Tensor:
    """timm's own blocks with the model's weights."""
    for ours in vit.blocks:
        options = {"init_values": vit.options.get("init_values"), "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
        block = Block(32, 2, qkv_bias=True, **options).eval()
        block.load_state_dict(ours.state_dict())
        x_BTD = block(x_BTD)
    return x_BTD


@torch.no_grad()
def test_tokens_are_satmaes(vit):
    images = torch.randn(2, 6, 32, 32)
    x = through_blocks(vit, satmae(vit, images))
    tokens = vit([images])[0]
    found = vit.visible(images, torch.arange(48).expand(2, -1))
    assert_close(found, vit.norm(x), atol=2e-5, rtol=1e-5)
    assert_close(tokens.patches_BND, found[:, vit.prefix_tokens :])
    assert tokens.patches_BND.shape == (2, 48, 32)


@torch.no_grad()
def test_visible_drops_the_other_tokens(vit):
    images, keep = torch.randn(2, 6, 32, 32), torch.rand(2, 48).argsort(1)[:, :9]
    embedded, expected = satmae(vit, images), []
    for tokens, places in zip(embedded, keep.tolist(), strict=True):
        x = torch.stack([*tokens[: vit.prefix_tokens], *(tokens[vit.prefix_tokens + place] for place in places)])[None]
        expected.append(vit.norm(through_blocks(vit, x))[0])
    assert_close(vit.visible(images, keep), torch.stack(expected), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_sizes_and_masks(vit):
    groups = [torch.randn(2, 6, 32, 32), torch.randn(3, 6, 16, 40)]
    masks = [torch.rand(2, 48) < 0.5, None]
    for packed, images, mask in zip(vit(groups, masks), groups, masks, strict=True):
        alone = vit([images], [mask])[0]
        assert_close(packed.patches_BND, alone.patches_BND, atol=2e-6, rtol=1e-5)
    changed = groups[0].clone()
    second = masks[0].unflatten(1, (3, 4, 4))[:, 1]  # of the group that is channel 1 alone
    changed[:, 1] += 7 * second.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert_close(vit([changed], masks[:1])[0].cls_BD, vit(groups, masks)[0].cls_BD)
    assert not torch.allclose(vit([changed])[0].cls_BD, vit(groups)[0].cls_BD, atol=1e-4)


@torch.no_grad()
def test_features_and_other_sizes(vit):
    features = vit.features(torch.randn(2, 6, 16, 40), blocks=2)
    assert (features.cls.shape, features.patches.shape) == ((2, 2, 32), (2, 30, 32))
    assert vit.positions(2, 5).shape[1] == 30 + (vit.prefix_tokens if vit.embeds_prefix else 0)
    own = vit.positions(2, 5)[0, -30:, 24:].unflatten(0, (3, 10))
    assert_close(own, vit.channel_embed[0, :, None].expand(-1, 10, -1))


def test_what_the_model_says_of_itself(vit):
    assert (vit.channels, vit.groups, vit.channel_groups, len(vit.mean), len(vit.std)) == (6, 3, GROUPS, 6, 6)
    assert [vit.patch_embed[i].proj.weight.shape[1] for i in range(3)] == [3, 1, 2]
    assert (vit.pos_embed.shape[2], vit.channel_embed.shape) == (24, (1, 3, 8))
    prefix = vit.prefix_tokens if vit.embeds_prefix else 0
    assert not vit.positions(4, 4)[0, :prefix].any()
    state = vit.state_dict()
    assert {"patch_embed.2.proj.weight", "channel_embed", "pos_embed"} <= state.keys()


@pytest.mark.parametrize(
    "groups", [((0, 1), (2, 3, 4)), ((0, 1, 2), (2, 3, 4, 5)), ((0, 1, 2, 3, 4, 6),), ((0, 1, 2, 3, 4, 5), ()), ()]
)
def test_each_channel_is_in_one_group(groups):
    with pytest.raises(WeightsError, match="each of the 6 channels"):
        build(NAME, 32, {**TINY, "in_chans": 6}, channel_groups=groups)


def test_a_width_that_cannot_be_divided_is_refused():
    with pytest.raises(WeightsError, match="multiple of 16, got 24"):
        build(NAME, 32, {**TINY, "embed_dim": 24}, channel_groups=((0, 1, 2),))


# Adapting


def test_the_paper_s_multispectral_encoder_trains_its_published_number_of_parameters():
    """explora-method.md, section 2.3: encoder, patch embeddings, class token of M-[1,L]-r32."""
    with torch.device("meta"):
        vit = build("vit_large_patch16_224.mae", 96, {"patch_size": 8, "in_chans": 10}, channel_groups=SENTINEL)
    learnt = set(adapt(vit, ExPLoRA(blocks=(0, -1), rank=32, patch_embed=True)))
    count = {name: p.numel() for name, p in vit.named_parameters() if name in learnt}
    patches = sum(number for name, number in count.items() if name.startswith("patch_embed."))
    assert (patches, count["cls_token"]) == (658_432, 1_024)
    assert sum(count.values()) == 28_168_192 + 658_432 + 1_024
    assert not {"pos_embed", "channel_embed", "mask_token"} & learnt
    assert vit.channel_embed is not None
    assert vit.channel_embed.shape == (1, 3, 256)


@torch.no_grad()
def test_low_rank_terms_start_at_nothing_and_merge(vit):
    images, method = torch.randn(2, 6, 16, 40), ExPLoRA(rank=4, patch_embed=True)
    before = vit([images])[0].patches_BND
    assert "patch_embed.1.proj.weight" in adapt(vit, method)
    assert_close(vit([images])[0].patches_BND, before, atol=1e-6, rtol=0)
    for module in vit.modules():
        if isinstance(module, LoRALinear):
            module.lora_b.normal_(std=0.3)
    adapted = vit([images])[0].patches_BND
    method.merge(vit)
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert_close(vit([images])[0].patches_BND, adapted, atol=1e-5, rtol=0)
