"""DINOv3: timm's Eva with rotary positions, against timm's own forward pass; low-rank terms on it."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.testing import assert_close

from explora.adapt import ExPLoRA, Full, LoRA, adapt
from explora.adapt.base import block_of, is_norm
from explora.adapt.lora import LoRALinear
from explora.engine.optim import _decays, _layers_above
from explora.errors import ConfigError, WeightsError
from explora.models import ViT, build
from explora.models.vit import timm

SMALL, PLUS = "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NORMED = {"qk_norm": True, "scale_attn_inner": True, "scale_mlp": True}
ARCHITECTURES = {
    "no bias": (SMALL, {}),
    "bias": (f"{SMALL}_qkvb", {}),
    "gated mlp": (PLUS, {}),
    "gated mlp and bias": (f"{PLUS}_qkvb", {}),
    "gate packed": (PLUS, {"swiglu_align_to": 0}),
    "7b": ("vit_7b_patch16_dinov3", {}),
    "normed": (f"{SMALL}_qkvb", NORMED),
    "no class token": (SMALL, {"class_token": False}),
    "no layer scale": (SMALL, {"init_values": None}),
    "four bands": (SMALL, {"in_chans": 4}),
}


def tiny(name: str = SMALL, **options) -> ViT:
    """A small model whose every parameter is far from its initial value."""
    torch.manual_seed(0)
    vit = build(name, 32, {**TINY, **options})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


def twin(vit: ViT, name: str, **options) -> nn.Module:
    """timm's own model with the same weights, loaded strictly: the names are timm's."""
    plain = {"num_classes": 0, "global_pool": "", "use_fc_norm": False}
    model = timm.create_model(name, img_size=32, **{**plain, **TINY, **options})
    model.load_state_dict({key: value for key, value in vit.state_dict().items() if key != "mask_token"})
    return model.eval()


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def pair(request) -> tuple[ViT, nn.Module]:
    name, options = request.param
    vit = tiny(name, **options)
    return vit, twin(vit, name, **options)


def everything(vit: ViT, images: Tensor) -> Tensor:
    """All output tokens but registers."""
    tokens = vit([images])[0]
    return torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)


def expected(model: nn.Module, images: Tensor) -> Tensor:
    out = model.forward_features(images)
    patches = out[:, model.num_prefix_tokens :]
    cls = patches.mean(1) if model.cls_token is None else out[:, 0]
    return torch.cat([cls[:, None], patches], 1)


# The forward pass


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (64, 64), (24, 40)])
@torch.no_grad()
def test_forward_equals_timm_at_every_size(pair, size):
    vit, model = pair
    images = torch.randn(2, vit.channels, *size)
    assert_close(everything(vit, images), expected(model, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_sizes_equal_separate_passes(pair):
    vit, _ = pair
    groups = [torch.randn(3, vit.channels, *size) for size in ((32, 32), (16, 16), (24, 40))]
    for packed, images in zip(vit(groups), groups, strict=True):
        alone = vit([images])[0]
        assert_close(packed.cls_BD, alone.cls_BD, atol=2e-6, rtol=1e-5)
        assert_close(packed.patches_BND, alone.patches_BND, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_visible_keeps_each_patch_at_its_angle(pair):
    vit, model = pair
    images, keep = torch.randn(2, vit.channels, 24, 40), torch.rand(2, 15).argsort(1)[:, :6]
    prefix, embedded = model.num_prefix_tokens, model.patch_embed(images).flatten(1, 2)
    still = [token.expand(2, -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    turns, whole = model.rope.get_embed((3, 5)), torch.cat([*still, embedded], 1)
    for image, places, found in zip(whole, keep, vit.visible(images, keep), strict=True):
        x = torch.cat([image[:prefix], image[prefix:][places]])[None]
        for block in model.blocks:
            x = block(x, rope=turns[places])
        assert_close(found, model.norm(x)[0], atol=1e-5, rtol=1e-5)
    whole_pass = vit.visible(images, torch.arange(15).expand(2, -1))
    assert_close(whole_pass[:, prefix:], vit([images])[0].patches_BND)


@torch.no_grad()
def test_a_mask_replaces_exactly_the_masked_embeddings():
    vit, images, mask = tiny(), torch.randn(2, 3, 24, 40), torch.rand(2, 15) < 0.4
    model = twin(vit, SMALL)
    embed = model.patch_embed
    kept = embed.forward
    embed.forward = lambda x: torch.where(mask.view(2, 3, 5, 1), vit.mask_token[0], kept(x))
    tokens = vit([images], [mask])[0]
    found = torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)
    assert_close(found, expected(model, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_features_are_those_of_timms_last_blocks():
    vit, images = tiny(PLUS), torch.randn(2, 3, 24, 40)
    model = twin(vit, PLUS)
    outputs = model.forward_intermediates(images, 2, return_prefix_tokens=True, norm=True, intermediates_only=True)
    features = vit.features(images, blocks=2)
    assert_close(features.cls, torch.stack([prefix[:, 0] for _, prefix in outputs], 1), atol=1e-5, rtol=1e-5)
    assert_close(features.patches, outputs[-1][0].flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert_close(features.mean, features.patches.mean(1))


@torch.no_grad()
def test_a_class_norm_of_local_crops_leaves_the_rest():
    vit, groups = tiny(), [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    local = nn.LayerNorm(32, eps=1e-5)
    nn.init.normal_(local.bias)
    plain, untied = vit(groups), vit(groups, None, [None, local])
    assert_close(untied[0].cls_BD, plain[0].cls_BD)
    assert_close(untied[1].patches_BND, plain[1].patches_BND)
    vit.norm = nn.Identity()
    assert_close(untied[1].cls_BD, local(vit([groups[1]])[0].cls_BD), atol=2e-6, rtol=1e-5)


def test_rope_is_not_augmented_in_training():
    vit, images = tiny(), torch.randn(2, 3, 24, 40)
    assert torch.equal(everything(vit.train(), images), everything(vit.eval(), images))
    with pytest.raises(WeightsError, match="DINOv3"):
        tiny(rope_jitter_coords=2.0)


@torch.no_grad()
def test_drop_path_takes_the_angles_of_the_kept_images_along():
    vit = tiny()
    vit.drop_path = 0.5
    images = [torch.randn(1, 3, 24, 40).expand(4, -1, -1, -1), torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1)]
    block = vit.blocks[0]
    x, layout = vit._pack(images, None)
    vit.blocks = nn.ModuleList([block])
    branch = block.gamma_1 * block.attn(block.norm1(x[:20][None]), rope=vit.rope.get_embed((3, 5)))
    kept = x[:20] + 2 * branch[0]
    kept = kept + 2 * block.gamma_2 * block.mlp(block.norm2(kept))
    found = [row for _ in range(20) for row in vit.train()._run(x, layout)[:80].view(4, 20, 32)]
    assert any(torch.allclose(row, kept, atol=1e-4) for row in found)
    assert any(torch.equal(row, x[:20]) for row in found)


def test_gradients_are_timms():
    vit, images = tiny(f"{PLUS}_qkvb"), torch.randn(2, 3, 24, 40)
    model = twin(vit, f"{PLUS}_qkvb")
    everything(vit, images).square().mean().backward()
    expected(model, images).square().mean().backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in vit.named_parameters():
        if name != "mask_token":
            assert_close(parameter.grad, theirs[name], atol=1e-6, rtol=1e-4)


def test_under_autocast_the_residual_stream_is_fp32_and_close():
    vit, images = tiny(f"{SMALL}_qkvb"), [torch.randn(2, 3, 32, 32), torch.randn(3, 3, 16, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        low = vit(images)
    for found, full in zip(low, vit(images), strict=True):
        assert found.patches_BND.dtype == torch.float32
        assert_close(found.patches_BND, full.patches_BND, atol=0.1, rtol=0.1)


def test_prefix_tokens_are_not_turned():
    vit = tiny()
    rope = vit._rope(3, 5)
    assert rope is not None
    x = torch.randn(20, 16)
    assert torch.equal(apply_rot_embed_cat(x, rope, half=True)[:5], x[:5])
    assert torch.equal(rope[5:], vit.rope.get_embed((3, 5)))


# Names


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_small_patch16_dinov3", 21.6),
        ("vit_small_plus_patch16_dinov3_qkvb", 28.7),
        ("vit_large_patch16_dinov3.sat493m", 303.1),
        ("vit_7b_patch16_dinov3", 6716),
    ],
)
def test_the_real_ones_build_with_their_sizes(name, millions):
    with torch.device("meta"):
        vit = build(name, 224)
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.05 if millions < 999 else 1)
    assert (vit.prefix_tokens, vit.patch_size, vit.pos_embed) == (5, 16, None)
    sat = name.endswith("sat493m")
    assert (vit.mean[0] == 0.430) == sat


def test_name_rules_hold_for_evas_names():
    vit = tiny(f"{PLUS}_qkvb")
    norms = {name for name, _ in vit.named_parameters() if is_norm(name)}
    inside = {f"blocks.{i}.norm{j}.{k}" for i in range(2) for j in (1, 2) for k in ("weight", "bias")}
    assert norms == {*inside, "norm.weight", "norm.bias"}
    assert block_of("blocks.1.gamma_1") == 1
    assert _layers_above("backbone.blocks.1.attn.q_bias", 2) == 1
    flat = {name for name, p in vit.named_parameters() if name.startswith("blocks.0.") and not _decays(name, p)}
    assert {"blocks.0.gamma_1", "blocks.0.gamma_2", "blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} <= flat
    decayed = {f"blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")}
    assert {name for name, _ in vit.named_parameters() if name.startswith("blocks.0.")} - flat == decayed


# Adapting


@pytest.mark.parametrize("name", [SMALL, f"{SMALL}_qkvb", PLUS])
@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("proj",), ("fc1",), ("fc2",), ("q", "k", "v", "proj", "fc1")])
@torch.no_grad()
def test_low_rank_terms_start_at_nothing_and_merge(name, targets):
    vit, images = tiny(name), torch.randn(2, 3, 24, 40)
    before, names = everything(vit, images), list(vit.state_dict())
    method = LoRA(rank=4, targets=targets)
    assert all(".lora_" in trained for trained in adapt(vit, method))
    assert_close(everything(vit, images), before, atol=1e-6, rtol=0)
    for module in vit.modules():
        if isinstance(module, LoRALinear):
            module.lora_b.normal_(std=0.3)
    adapted = everything(vit, images)
    assert not torch.allclose(adapted, before, atol=1e-3)
    method.merge(vit)
    assert_close(everything(vit, images), adapted, atol=1e-5, rtol=1e-5)
    assert sorted(vit.state_dict()) == sorted(names)
    assert_close(expected(twin(vit, name), images), adapted, atol=1e-5, rtol=1e-5)


def test_a_gate_that_stands_apart_gets_its_own_term():
    learnt = adapt(tiny(PLUS), LoRA(rank=2, targets=("fc1",)))
    assert sorted({name.rpartition(".")[0] for name in learnt if name.startswith("blocks.0.")}) == [
        "blocks.0.mlp.fc1_g",
        "blocks.0.mlp.fc1_x",
    ]


def test_explora_counts_blocks_norms_and_terms():
    vit = tiny(f"{PLUS}_qkvb")
    learnt = set(adapt(vit, ExPLoRA(rank=2)))
    block, d, h, r = "blocks.1.", 32, 128, 2
    count = sum(p.numel() for name, p in vit.named_parameters() if name in learnt)
    full = 4 * d * d + 3 * d + 3 * d * h + 2 * h + d + 2 * d + 4 * d  # attention, gated MLP, two gammas, two norms
    assert count == full + 4 * d * r + 4 * d + 2 * d + d
    assert {name for name, _ in vit.named_parameters() if name.startswith(block)} <= learnt


def test_the_frozen_base_is_shared_by_a_copy():
    vit = tiny(f"{SMALL}_qkvb")
    adapt(vit, ExPLoRA(rank=2))
    frozen = {id(p): p for p in vit.parameters() if not p.requires_grad}
    other = copy.deepcopy(vit, dict(frozen))
    shared = {id(p) for p in other.parameters()} & frozen.keys()
    assert shared == frozen.keys()
    assert len(adapt(vit, Full())) == len(list(vit.parameters()))


# What is refused


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eva02_tiny_patch14_224", {}),
        ("beit_base_patch16_224", {}),
        ("vit_base_patch16_rope_mixed_224", {}),
        ("vit_base_patch16_rope_ape_224", {}),
        ("vit_base_patch16_sapiens2", {}),
        (SMALL, {"qkv_fused": False}),
        (SMALL, {"use_post_norm": True, "init_values": None}),
        (SMALL, {"rope_type": "cat"}),
        (SMALL, {"use_abs_pos_emb": True}),
        (SMALL, {"attn_type": "rope"}),
    ],
)
def test_what_the_forward_pass_does_not_cover_is_refused(name, options):
    with torch.device("meta"), pytest.raises(WeightsError, match="plain"):
        build(name, 224, options)


def test_channel_groups_need_a_position_embedding():
    with pytest.raises(WeightsError, match="no position embedding"):
        build(SMALL, 32, {**TINY, "in_chans": 4}, channel_groups=((0, 1), (2, 3)))


def test_a_rank_that_is_not_low_is_refused():
    with pytest.raises(ConfigError, match="32 wide"):
        adapt(tiny(), LoRA(rank=32, alpha=32))
