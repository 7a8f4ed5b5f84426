"""Methods against published counts, naive low-rank products and plain modules."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.testing import assert_close

from explora.adapt import ExPLoRA, Frozen, Full, LoRA, Method, SynQT, adapt, lora
from explora.adapt.lora import LoRALinear
from explora.adapt.places import Place, merge
from explora.config import load
from explora.engine.optim import OptimConfig, Optimizer
from explora.errors import ConfigError
from explora.models import ViT, build, fingerprint
from explora.objectives import DINOv2, DINOv2Config
from explora.schedules import Progress

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "init_values": 0.5}
TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")


def tiny() -> ViT:
    torch.manual_seed(0)
    return build("vit_tiny_patch16_224", 32, TINY).eval()


def stir(vit: ViT) -> None:
    """Let every low-rank term say something."""
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.3)


@torch.no_grad()
def outputs(vit: ViT) -> Tensor:
    torch.manual_seed(1)
    tokens = vit([torch.randn(2, 3, 32, 32)])[0]
    return torch.cat([tokens.cls_BD[:, None], tokens.patches_BND], 1)


# What trains: explora-method.md, section 2.3, without the class token


@cache
def large(name: str) -> ViT:
    with torch.device("meta"):
        return build(name, 224)


def count(name: str, method: Method) -> int:
    vit = copy.deepcopy(large(name))
    learnt = set(adapt(vit, method))
    return sum(p.numel() for key, p in vit.named_parameters() if key in learnt)


L, B, MAE = "vit_large_patch14_dinov2", "vit_base_patch14_dinov2", "vit_large_patch16_224"


@pytest.mark.parametrize(
    ("name", "blocks", "rank", "expected"),
    [
        (L, (-1,), 64, 18_723_840),
        (L, (-1,), None, 12_694_528),
        (L, (0, -2, -1), 64, 43_387_904),
        (B, (-1,), 64, 9_287_424),
        (L, (-2, -1), None, 25_288_704),
        (L, (-2, -1), 64, 31_055_872),
        (L, (), 64, 6_391_808),
        (L, (), 256, 25_266_176),
        (L, (-1,), 8, 13_448_192),
        (L, (-1,), 32, 15_709_184),
        (L, (-1,), 128, 24_753_152),
        (MAE, (-1,), 64, 18_721_792),
        (MAE, (0, -1), 32, 28_168_192),
    ],
)
def test_explora_trains_the_published_number_of_parameters(name, blocks, rank, expected):
    options = {"rank": rank} if rank else {"targets": ()}
    width = large(name).width
    assert count(name, ExPLoRA(blocks=blocks, cls_token=False, **options)) == expected
    assert count(name, ExPLoRA(blocks=blocks, **options)) == expected + width
    assert count(name, ExPLoRA(blocks=blocks, mask_token=True, **options)) == expected + 2 * width


def test_lora_trains_the_published_number_of_parameters():
    assert count(L, LoRA(rank=8)) == 786_432


def test_the_ends_of_the_scale():
    assert count(L, Frozen()) == 0
    assert count(L, Full()) == sum(p.numel() for p in large(L).parameters())


def test_norms_can_stay_frozen():
    d, r = 1024, 64
    assert count(L, ExPLoRA(norms=False, cls_token=False)) == 12 * d**2 + 15 * d + 23 * 4 * d * r


# Which blocks


def test_negative_blocks_count_from_the_end():
    names = [adapt(tiny(), ExPLoRA(blocks=blocks, rank=2)) for blocks in ((0, 2), (-3, -1), (0, -1, 2))]
    assert names[0] == names[1] == names[2]
    assert "blocks.0.mlp.fc1.weight" in names[0]
    assert "blocks.1.mlp.fc1.weight" not in names[0]
    assert "blocks.1.attn.qkv.lora_a" in names[0]


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_that_is_not_there_is_refused(block):
    with pytest.raises(ConfigError, match=rf"\[{block}\] outside a model of 3 blocks; use -3 to 2"):
        adapt(tiny(), ExPLoRA(blocks=(-1, block)))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"targets": ["w"]}, {"blocks": "last"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        load(ExPLoRA, wrong)


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=33), ExPLoRA(rank=1, alpha=64, targets=("fc1",))])
def test_an_absurd_scale_is_refused(method):
    with pytest.raises(ConfigError, match=r"^adapt: alpha / rank is (16\.5|64), and above 16"):
        adapt(tiny(), method)
    adapt(tiny(), LoRA(rank=2, alpha=32))


@pytest.mark.parametrize(("rank", "target"), [(32, "q"), (33, "proj"), (64, "fc1"), (32, "fc2")])
def test_a_rank_that_is_not_low_is_refused(rank, target):
    with pytest.raises(ConfigError, match=rf"^adapt: rank {rank} .* is 32 wide"):
        adapt(tiny(), LoRA(rank=rank, targets=(target,)))


def test_a_target_that_the_blocks_lack_is_refused():
    vit = tiny()
    vit.blocks[1].mlp = nn.Identity()
    with pytest.raises(ConfigError, match=r"adapt.targets: blocks.1 has no linear map mlp.fc1 or .*; leave this"):
        adapt(vit, LoRA(rank=2, targets=("fc1",)))


@pytest.mark.parametrize("patch_embed", [True, False])
def test_the_patch_embedding_learns_where_it_is_asked_to(patch_embed):
    learnt = adapt(tiny(), ExPLoRA(rank=2, patch_embed=patch_embed))
    assert {name for name in learnt if "patch" in name} == (
        {"patch_embed.proj.weight", "patch_embed.proj.bias"} if patch_embed else set()
    )


# The low-rank term


@pytest.mark.parametrize("targets", [*[(target,) for target in TARGETS], TARGETS, ("v", "q"), ()])
@pytest.mark.parametrize("kind", [ExPLoRA, LoRA])
def test_nothing_changes_at_the_start_and_merging_keeps_the_outputs(kind, targets):
    if kind is LoRA and not targets:
        with pytest.raises(ConfigError, match="targets"):
            load(LoRA, {"targets": []})
        return
    vit = tiny()
    before, names, shapes = outputs(vit), list(vit.state_dict()), {k: v.shape for k, v in vit.state_dict().items()}
    method = kind(targets=targets, rank=4, alpha=8)
    adapt(vit, method)
    assert_close(outputs(vit), before, atol=1e-6, rtol=0)
    assert set(names) <= set(vit.state_dict())
    stir(vit)
    adapted = outputs(vit)
    assert torch.allclose(adapted, before, atol=1e-3) == (not targets)
    method.merge(vit)
    assert_close(outputs(vit), adapted, atol=1e-5, rtol=0)
    assert sorted(vit.state_dict()) == sorted(names)
    assert {k: v.shape for k, v in vit.state_dict().items()} == shapes
    assert type(vit.get_submodule("blocks.0.attn.qkv")) is nn.Linear


@torch.no_grad()
def test_any_module_with_timms_blocks_takes_low_rank_terms():
    """The decoder of a MAE is one; official counts: q and v of 8 blocks of width 512 at rank 32."""
    decoder = nn.Module()
    decoder.blocks = nn.ModuleList([Block(512, 16, qkv_bias=True) for _ in range(8)])
    x, names = torch.randn(1, 5, 512), list(decoder.state_dict())
    before = nn.Sequential(*decoder.blocks)(x)
    lora.insert(decoder, range(8), ("q", "v"), 32, 1 / 32)
    terms = {name: p for name, p in decoder.named_parameters() if lora.is_lora(name)}
    assert sum(p.numel() for p in terms.values()) == 524_288
    assert_close(nn.Sequential(*decoder.blocks)(x), before, atol=1e-6, rtol=0)
    for parameter in terms.values():
        parameter.normal_(std=0.1)
    adapted = nn.Sequential(*decoder.blocks)(x)
    assert not torch.allclose(adapted, before, atol=1e-2)
    merge(decoder)
    assert list(decoder.state_dict()) == names
    assert_close(nn.Sequential(*decoder.blocks)(x), adapted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parts", [(0, 2), (1,), (0, 1, 2)])
def test_a_fused_layer_is_a_plain_product_plus_one_term_a_slice(parts):
    torch.manual_seed(0)
    base = nn.Linear(6, 15, dtype=torch.float64)
    layer = LoRALinear(Place("qkv", base, parts, 3), rank=2, scale=0.7)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    a = [part.detach().clone().requires_grad_() for part in layer.lora_a.chunk(len(parts))]
    b = [part.detach().clone().requires_grad_() for part in layer.lora_b]

    slices = []
    for piece in range(3):
        y = x @ base.weight[5 * piece : 5 * piece + 5].T + base.bias[5 * piece : 5 * piece + 5]
        if piece in parts:
            i = parts.index(piece)
            y = y + 0.7 * (x @ a[i].T @ b[i].T)
        slices.append(y)
    expected, upstream = torch.cat(slices, 1), torch.randn(4, 15, dtype=torch.float64)
    naive = torch.autograd.grad(expected, [x, *a, *b], upstream)
    ours = torch.autograd.grad(layer(x), [x, layer.lora_a, layer.lora_b], upstream)

    assert_close(layer(x), expected)
    assert_close(ours[0], naive[0])
    assert_close(ours[1], torch.cat(naive[1 : 1 + len(parts)]))
    assert_close(ours[2], torch.stack(naive[1 + len(parts) :]))
    assert_close(layer.merged()(x), expected)


def test_first_factor_is_kaiming_uniform_of_each_slice():
    torch.manual_seed(0)
    layer = LoRALinear(Place("qkv", nn.Linear(300, 900), (0, 2), 3), rank=64, scale=1.0)
    bound = (1 / 300) ** 0.5  # kaiming_uniform with a = sqrt(5)
    for part in layer.lora_a.detach().chunk(2):
        assert part.abs().max() <= bound
        assert_close(part.std(), torch.tensor(bound / 3**0.5), rtol=0.02, atol=0)
    assert not layer.lora_b.any()


@pytest.mark.parametrize(("method", "scale"), [(ExPLoRA(rank=16), 1 / 16), (LoRA(), 1.0), (LoRA(rank=4, alpha=2), 0.5)])
def test_what_counts_is_alpha_over_rank(method, scale):
    assert (method.scale, ExPLoRA().scale) == (scale, 1 / 64)
    vit = tiny()
    adapt(vit, method)
    layers = [module for module in vit.modules() if isinstance(module, LoRALinear)]
    assert {layer.scale for layer in layers} == {scale}


# Drop path


def test_drop_path_leaves_out_as_much_where_queries_read_the_blocks():
    vit = tiny().train()
    vit.drop_path = 0.5
    before = outputs(vit)
    adapt(vit, SynQT(tokens=2, bottleneck=4))
    assert torch.equal(outputs(vit), before)
    vit.drop_path = 0.0
    assert not torch.equal(outputs(vit), before)


# Training


def test_two_steps_leave_the_frozen_tensors_bit_for_bit():
    vit = tiny()
    names = adapt(vit, ExPLoRA(rank=2))
    config = DINOv2Config.model_validate({"head": {"prototypes": 16, "hidden": 8, "bottleneck": 4, "layers": 2}})
    objective = DINOv2(config, vit, batch=4)
    optimizer = Optimizer(OptimConfig(lr=0.1, weight_decay=(0.4, 0.4)), objective, 4)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    base = fingerprint(objective.frozen())
    for step in range(2):
        batch = {
            "global": torch.randn(2, 4, 3, 32, 32),
            "local": torch.randn(2, 4, 3, 16, 16),
            "mask": torch.rand(2, 4, 16) < 0.3,
        }
        progress = Progress(step, 2, 4, 100)
        loss = objective(batch, objective.targets([batch], progress)[0], progress).loss
        loss.backward()
        assert optimizer.step(progress, loss.detach()) is not None
        objective.after_step(progress)
    changed = {name for name, tensor in vit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(names)
    assert fingerprint(objective.frozen()) == base
