"""SynQT: the frozen model's own class token as oracle of every read, patch tokens bit for bit, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from stage_folder import KINDS, tiny
from torch import Tensor, nn
from torch.testing import assert_close

from explora.adapt import SynQT, adapt
from explora.errors import ConfigError
from explora.models import ViT, build

SIZES = [(2, 32), (3, 16)]


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(count, 3, side, side, generator=generator) for count, side in SIZES]


def extended(kind: str = "plain") -> tuple[ViT, ViT]:
    """The source, and a copy with queries in which nothing is zero."""
    source = tiny(kind)
    vit = copy.deepcopy(source)
    learnt = adapt(vit, SynQT(tokens=2, bottleneck=3))
    with torch.no_grad():
        for name in learnt:
            vit.get_parameter(name).add_(torch.randn_like(vit.get_parameter(name)) * 0.2)
    return source, vit


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_source_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    vit = tiny(kind)
    norms = [None, copy.deepcopy(vit.norm)]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        before = vit(images(), class_norms=norms)
        adapt(vit, SynQT(tokens=2, bottleneck=3))
        after = vit(images(), class_norms=norms)
    for found, expected in zip(after, before, strict=True):
        assert torch.equal(found.cls_BD, expected.cls_BD)
        assert torch.equal(found.patches_BND, expected.patches_BND)


@pytest.mark.parametrize("kind", list(KINDS))
def test_patches_stay_and_get_no_gradient(kind: str) -> None:
    source, vit = extended(kind)
    for found, expected in zip(vit(images()), source(images()), strict=True):
        assert torch.equal(found.patches_BND, expected.patches_BND)
        assert not found.patches_BND.requires_grad
        assert found.cls_BD.requires_grad
        assert not torch.equal(found.cls_BD, expected.cls_BD)
    visible = torch.tensor([[0, 3], [1, 2]])
    assert torch.equal(vit.visible(images()[0], visible), source.visible(images()[0], visible))


@torch.no_grad()
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_query_that_is_the_class_token_goes_its_way(kind: str) -> None:
    """It reads the same tokens through the same block, so it finds what the class token becomes, block after block."""
    vit = tiny(kind)
    adapt(vit, SynQT(tokens=1, bottleneck=3))
    stream, layout = vit._pack(images(), None)
    vit.blocks[0].reader.tokens.copy_(stream[:1])  # type: ignore[union-attr, operator]
    for block in list(vit.blocks)[1:]:
        block.reader.tokens.zero_()  # type: ignore[union-attr, operator]
    _, read = vit._read(stream, layout)
    classes = []
    for block in vit.blocks:
        stream = block(stream, layout)
        classes.append(torch.cat([part[:, 0] for part in vit._unpack(stream, layout)]))
    for found, cls in zip(read, classes, strict=True):
        assert_close(found[:, 0], cls, atol=1e-5, rtol=1e-5)

    weights, biases = vit.pool.weights.normal_(), vit.pool.biases.normal_()
    vit.pool.norm.weight.mul_(2)
    pooled = classes[-1].clone()
    for row, cls in enumerate(classes):
        seen = (cls - cls.mean(1, keepdim=True)) / (cls.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        pooled += torch.tanh(seen @ weights[row] + biases[row])[:, None] * cls / len(classes)
    expected = 2 * (vit.norm(pooled) - vit.norm.bias) + vit.norm.bias
    assert_close(torch.cat([tokens.cls_BD for tokens in vit(images())]), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_queries_are_tokens_the_block_before_and_an_adapter() -> None:
    _, vit = extended()
    first, second = (block.reader for block in vit.blocks)
    before = torch.randn(5, 2, 48)
    assert first.carry is None
    for reader, z in ((first, first.tokens.expand(5, -1, -1)), (second, second.tokens + second.carry * before)):
        adapter = nn.Sequential(nn.Linear(48, 3), nn.GELU(), nn.Linear(3, 48))
        values = (reader.down, reader.down_bias, reader.up, reader.up_bias)
        adapter.load_state_dict(dict(zip(adapter.state_dict(), values, strict=True)))
        assert_close(reader(before, 5), z + adapter(z))


@torch.no_grad()
def test_evaluators_read_the_new_class_token_of_the_last_block_alone() -> None:
    source, vit = extended()
    batch = images()[0]
    found, expected = vit.features(batch, 2), source.features(batch, 2)
    assert torch.equal(found.cls[:, 0], expected.cls[:, 0])
    assert torch.equal(found.cls[:, 1], vit([batch])[0].cls_BD)
    assert torch.equal(found.patches, expected.patches)
    assert torch.equal(found.mean, expected.mean)


def test_images_and_groups_do_not_mix() -> None:
    _, vit = extended()
    together = torch.cat([tokens.cls_BD for tokens in vit(images())])
    alone = [vit([image[None]])[0].cls_BD for batch in images() for image in batch]
    assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_as_much_learns_as_was_chosen() -> None:
    with torch.device("meta"):
        vit = build("vit_base_patch16_224", 224)
        adapt(vit, SynQT())
    reader = 4 * 768 + 2 * 48 * 768 + 48 + 768
    assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == 12 * (reader + 768 + 1) + 11 + 2 * 768


def test_tokens_begin_uniform_between_minus_one_and_one() -> None:
    vit = build("vit_tiny_patch16_224", 32, {"depth": 1})
    adapt(vit, SynQT(tokens=40))
    tokens = vit.blocks[0].reader.tokens.detach()  # type: ignore[union-attr]
    assert tokens.abs().max() <= 1
    assert_close(tokens.quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([-0.5, 0, 0.5]), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_tiny_patch16_224", {"class_token": False}, "no class token"),
        ("vit_tiny_patch16_224", {"norm_layer": "rmsnorm"}, "begins as a LayerNorm"),
    ],
)
def test_models_without_a_place_for_it_are_refused(name: str, options: dict[str, str], reason: str) -> None:
    vit = build(name, 32, {"depth": 1, **options})
    with pytest.raises(ConfigError, match=reason):
        adapt(vit, SynQT())
    assert not vit.additions
    assert vit.pool is None
