"""Backbones against timm's own forward pass, attention against SDPA, and weights that must not load."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from explora.errors import WeightsError
from explora.models import ModelConfig, ViT, build, load_model
from explora.models.attention import Group
from explora.models.blocks import Layout, residual
from explora.models.vit import timm

DEIT = Path(os.environ.get("EXPLORA_SHARED", "../shared")) / "data/weights/deit_tiny_patch16_224.in1k.safetensors"
NAME = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def tiny(image_size: int = 32, name: str = NAME, **options) -> ViT:
    """A small model whose every parameter is far from its initial value."""
    torch.manual_seed(0)
    vit = build(name, image_size, {**TINY, **options})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit.eval()


def twin(vit: ViT, name: str = NAME, **options) -> nn.Module:
    """timm's own model with the same weights."""
    plain = {"num_classes": 0, "global_pool": "", "fc_norm": False, "dynamic_img_size": True}
    model = timm.create_model(name, img_size=vit.image_size, **{**plain, **TINY, **options})
    model.load_state_dict({key: value for key, value in vit.state_dict().items() if key != "mask_token"})
    return model.eval()


def tokens_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """timm's class token (or mean patch) and patch tokens."""
    out = model.forward_features(images)
    patches = out[:, model.num_prefix_tokens :]
    return (out[:, 0] if model.has_class_token else patches.mean(1)), patches


ARCHITECTURES = {
    "plain": (NAME, {}),
    "layer scale": (NAME, {"init_values": 0.5}),
    "no class token": (NAME, {"class_token": False}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "registers with positions": (NAME, {"reg_tokens": 2}),
    "normed queries": (NAME, {"qk_norm": True, "scale_attn_norm": True}),
    "norm before": ("vit_base_patch16_clip_224", {}),
    "mean pool": (NAME, {"global_pool": "avg"}),
}


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def pair(request) -> tuple[ViT, nn.Module]:
    name, options = request.param
    vit = tiny(name=name, **options)
    return vit, twin(vit, name, **options)


# The forward pass


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (48, 48), (24, 40)])
@torch.no_grad()
def test_forward_equals_timm_at_every_size(pair, size):
    vit, model = pair
    images = torch.randn(2, 3, *size)
    tokens = vit([images])[0]
    cls, patches = tokens_of(model, images)
    assert_close(tokens.cls_BD, cls, atol=2e-5, rtol=1e-5)
    assert_close(tokens.patches_BND, patches, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_sizes_equal_separate_passes(pair):
    vit, _ = pair
    groups = [torch.randn(3, 3, 32, 32), torch.randn(5, 3, 16, 16), torch.randn(1, 3, 24, 40)]
    for packed, images in zip(vit(groups), groups, strict=True):
        alone = vit([images])[0]
        assert_close(packed.cls_BD, alone.cls_BD, atol=2e-6, rtol=1e-5)
        assert_close(packed.patches_BND, alone.patches_BND, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_mask_replaces_exactly_the_masked_embeddings():
    vit, images, mask = tiny(), torch.randn(2, 3, 32, 32), torch.rand(2, 16) < 0.4
    embedded = []
    for image, hidden in zip(images, mask, strict=True):
        rows = vit.patch_embed.proj(image[None]).flatten(2).transpose(1, 2)[0]
        rows = torch.stack([vit.mask_token[0] if hide else row for hide, row in zip(hidden, rows, strict=True)])
        embedded.append(torch.cat([vit.cls_token[0], rows]) + vit.pos_embed[0])
    model = twin(vit)
    expected = model.norm(model.blocks(torch.stack(embedded)))
    tokens = vit([images], [mask])[0]
    assert_close(torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1), expected, atol=2e-5, rtol=1e-5)
    changed = images.clone()
    patches = changed.unfold(2, 8, 8).unfold(3, 8, 8)  # a view
    patches += mask.view(2, 1, 4, 4, 1, 1) * 7.0
    assert not torch.equal(changed, images)
    assert_close(vit([changed], [mask])[0].patches_BND, tokens.patches_BND)


@torch.no_grad()
def test_features_are_those_of_timms_last_blocks():
    vit, images = tiny(), torch.randn(2, 3, 32, 32)
    model = twin(vit)
    cls, grids = [], []
    for grid, token in model.get_intermediate_layers(images, n=2, return_prefix_tokens=True, norm=True):
        cls.append(token[:, 0])
        grids.append(grid)
    features = vit.features(images, blocks=2)
    assert_close(features.cls, torch.stack(cls, 1), atol=2e-5, rtol=1e-5)
    assert_close(features.patches, grids[-1], atol=2e-5, rtol=1e-5)
    assert_close(features.mean, grids[-1].mean(1), atol=2e-5, rtol=1e-5)


# Drop path


def test_drop_path_keeps_the_mean_and_skips_whole_images():
    groups = (Group(4, 5), Group(6, 10))
    layout, x = Layout(groups, torch.arange(80.0)[:, None]), torch.randn(80, 3)

    def ones(rows: Tensor, part: Layout) -> Tensor:
        assert part.rope_TK is not None
        assert len(part.rope_TK) == len(rows)
        assert_close(rows, x[part.rope_TK[:, 0].long()])  # each token keeps its rotation
        return torch.ones_like(rows)

    assert_close(residual(ones, x, layout, 0.0) - x, torch.ones_like(x))
    drops = [residual(ones, x, layout, 0.5) - x for _ in range(400)]
    for drop in drops[:5]:
        for of_images in (drop[:20].view(4, 5, 3), drop[20:].view(6, 10, 3)):
            kept = of_images[:, 0, 0]
            assert_close(of_images, kept.view(-1, 1, 1).expand_as(of_images), atol=1e-5, rtol=0)
            half_of_them = torch.tensor([0.0, 2.0]).repeat_interleave(len(kept) // 2)
            assert_close(kept.sort().values, half_of_them, atol=1e-5, rtol=0)
    assert_close(torch.stack(drops).mean(0), torch.ones_like(x), atol=0.25, rtol=0)


@torch.no_grad()
def test_drop_path_only_while_training():
    vit, images = tiny(), [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    without = vit(images)
    vit.drop_path = 0.5
    assert_close(vit(images)[1].cls_BD, without[1].cls_BD)
    dropped = vit.train()(images)
    assert [part.patches_BND.shape for part in dropped] == [part.patches_BND.shape for part in without]
    assert not torch.allclose(dropped[0].cls_BD, without[0].cls_BD)


@pytest.mark.parametrize("options", [{"init_values": 0.5}, {"init_values": 0.5, "reg_tokens": 2}])
@torch.no_grad()
def test_drop_path_equals_a_pass_of_the_kept_images_alone(options):
    """Of two images one is kept a branch: it is as if the branch, doubled, ran on that image alone."""
    vit, image = tiny(**options), torch.randn(1, 3, 24, 40)
    vit.drop_path = 0.5
    x = vit._pack([image], None)[0].clone()
    for block in vit.blocks:
        for norm, inner, scale in ((block.norm1, block.attn, block.ls1), (block.norm2, block.mlp, block.ls2)):
            x = x + 2 * scale(inner(norm(x[None])))[0]
    twice = vit.norm(x)  # what an image becomes that is kept every time
    for seed in range(200):
        torch.manual_seed(seed)
        both = vit.train()([image.expand(2, -1, -1, -1)])[0].cls_BD
        if torch.allclose(both, twice[0].expand(2, -1), atol=1e-4):
            pytest.fail("both images were kept")
        if any(torch.allclose(one, twice[0], atol=1e-4) for one in both):
            return
    pytest.fail("no image was ever kept in all branches")


# Untied norms of class tokens, and visible patches


@torch.no_grad()
def test_a_class_norm_replaces_the_final_norm_of_its_group_alone(pair):
    vit, _ = pair
    groups = [torch.randn(3, 3, 32, 32), torch.randn(5, 3, 24, 40)]
    own = nn.LayerNorm(32, eps=1e-3)
    nn.init.normal_(own.weight)
    plain = vit(groups)
    if vit.cls_token is None:
        with pytest.raises(AssertionError, match="no class token"):
            vit(groups, None, [None, own])
        return
    first, second = vit(groups, None, [None, own])
    for tokens, expected in ((first, plain[0]), (second, plain[1])):
        assert_close(tokens.patches_BND, expected.patches_BND)
    assert_close(first.cls_BD, plain[0].cls_BD)
    vit.norm = nn.Identity()
    assert_close(second.cls_BD, own(vit([groups[1]])[0].cls_BD), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_visible_equals_timms_blocks_on_what_is_left(pair):
    vit, model = pair
    images = torch.randn(3, 3, 32, 48)
    keep = torch.rand(3, 24).argsort(1)[:, :7]
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    prefix, expected = model.num_prefix_tokens, []
    for image, places in zip(embedded, keep, strict=True):
        left = torch.stack([*image[:prefix], *(image[prefix + place] for place in places.tolist())])
        expected.append(model.norm(model.blocks(left[None]))[0])
    assert_close(vit.visible(images, keep), torch.stack(expected), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_all_patches_visible_in_order_are_the_forward_pass(pair):
    vit, _ = pair
    images = torch.randn(2, 3, 24, 40)
    tokens, whole = vit.visible(images, torch.arange(15).expand(2, -1)), vit([images])[0]
    assert_close(tokens[:, vit.prefix_tokens :], whole.patches_BND)
    if vit.cls_token is not None:
        assert_close(tokens[:, 0], whole.cls_BD)


@torch.no_grad()
def test_what_is_not_visible_is_not_seen():
    vit, images, keep = tiny(), torch.randn(1, 3, 32, 32), torch.tensor([[3, 9, 4]])
    before = vit.visible(images, keep)
    places = images.unfold(2, 8, 8).unfold(3, 8, 8)  # a view: (1, 3, 4, 4, 8, 8)
    places[:, :, 3, 3] += 5  # patch 15
    assert torch.equal(vit.visible(images, keep), before)
    places[:, :, 2, 1] += 5  # patch 9
    assert not torch.allclose(vit.visible(images, keep), before)


# Which architectures


@pytest.mark.parametrize("size", [30, 6])
def test_an_image_size_that_cuts_patches_is_refused_with_sizes_that_do_not(size):
    with pytest.raises(WeightsError, match="use 24 or 32" if size == 30 else "use 8$"):
        tiny(size)


@pytest.mark.parametrize("options", [{"patch_size": 0}, {"embed_dim": -8, "num_heads": 2}, {"depth": "x"}])
def test_a_refusal_of_timm_has_words(options):
    with pytest.raises(WeightsError, match=r"is no plain vision transformer: \w"):
        tiny(**options)


def test_a_wordless_assertion_gets_words(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(WeightsError, match="timm refuses it with AssertionError and no word why"):
        tiny()


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(WeightsError, match="vit_tiny_patch16_224"):
        build("vit_tny_patch16_224", 32)


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "resnet18",
        "eva02_tiny_patch14_224",
        "deit_tiny_distilled_patch16_224",
        "vit_tiny_r_s16_p8_224",
        "vit_small_patch16_18x2_224",
        "vit_relpos_small_patch16_224",
    ],
)
def test_what_is_no_plain_vit_is_refused(name):
    with torch.device("meta"), pytest.raises(WeightsError, match="plain"):
        build(name, 224)


@pytest.mark.parametrize("options", [{"embed_dim": 30, "num_heads": 4}, {"depht": 3}])
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(WeightsError, match=next(iter(options)).replace("embed_dim", "divisible")):
        build(NAME, 32, options)


# Bands


@torch.no_grad()
def test_other_bands_take_images_that_are_normalised_already():
    vit = tiny(in_chans=5)
    assert (vit.channels, vit.groups, vit.channel_groups) == (5, 1, None)
    assert (vit.mean, vit.std) == ((0.0,) * 5, (1.0,) * 5)
    images = torch.randn(2, 5, 24, 40)
    assert_close(vit([images])[0].patches_BND, tokens_of(twin(vit, in_chans=5), images)[1], atol=2e-5, rtol=1e-5)


# Real weights


@pytest.mark.skipif(not DEIT.exists(), reason="EXPLORA_SHARED has no DeiT-Ti weights here")
@torch.no_grad()
def test_real_deit_loads_whole_and_gives_timms_features():
    vit, account, *_ = load_model(ModelConfig(name="deit_tiny_patch16_224", weights=str(DEIT)))
    assert account is not None
    assert account.missing == ("mask_token",)
    assert account.loaded == account.total - 192 == 5_717_416 - 193_000  # all but mask token and head
    assert account.unused == ("head.bias", "head.weight")
    model = timm.create_model("deit_tiny_patch16_224", num_classes=1000)
    model.load_state_dict(load_file(DEIT))
    images = torch.randn(2, 3, 224, 224)
    tokens = vit.eval()([images])[0]
    cls, patches = tokens_of(model.eval(), images)
    assert_close(tokens.cls_BD, cls, atol=1e-4, rtol=1e-4)
    assert_close(tokens.patches_BND, patches, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("untied", [False, True])
def test_tokens_that_nobody_wants_change_nothing_else(untied):
    torch.manual_seed(0)
    vit = build("vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}).double()
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.2)
    images = [torch.randn(3, 3, 32, 32).double(), torch.randn(2, 3, 16, 16).double()]
    masks = [torch.rand(3, 16) < 0.5, None]
    norms = [None, torch.nn.LayerNorm(32).double()] if untied else None
    some, none = torch.tensor([40, 3, 17]), torch.empty(0, dtype=torch.int64)

    def seen(wanted: list[Tensor | None] | None) -> tuple[list[Tensor], list[Tensor]]:
        first, second = vit(images, masks, norms, wanted)
        picked = first.patches_BND.flatten(0, 1)[some] if wanted is None else first.patches_BND
        outputs = [first.cls_BD, second.cls_BD, picked]
        loss = sum(output.sin().sum() for output in outputs)
        return outputs, list(torch.autograd.grad(loss, vit.parameters(), allow_unused=True))

    assert_close(seen([some, none]), seen(None), rtol=1e-10, atol=1e-12)
    whole = vit(images, masks, norms)
    for one, all_of_it in zip(vit(images, masks, norms, [some, None]), whole, strict=True):
        assert_close(one.cls_BD, all_of_it.cls_BD, rtol=1e-10, atol=1e-12)
    assert_close(vit(images, masks, norms, [some, None])[1].patches_BND, whole[1].patches_BND, rtol=1e-10, atol=1e-12)


def test_the_last_block_leaves_out_what_nobody_wants():
    vit = build("vit_tiny_patch16_224", 32, {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2})
    rows = []
    for block in vit.blocks:
        block.mlp.register_forward_hook(lambda _module, given, _result: rows.append(len(given[0])))
    vit([torch.randn(3, 3, 32, 32)], None, None, [torch.tensor([5, 30])])
    assert rows == [3 * 17, 3 + 2]
