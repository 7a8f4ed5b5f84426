"""(IA)^3 against a naive block, the same factors put into the weights by hand, and the published counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage_folder import KINDS as UNBIASED
from stage_folder import SIZE, TINY, encoded, images, stage
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from explora.adapt import IA3, adapt, attach, unplug
from explora.engine.optim import OptimConfig, parameter_groups
from explora.models import ViT, build, load_backbone
from explora.models.attention import Group
from explora.models.blocks import Layout
from explora.objectives import DINOv2, DINOv2Config

KINDS = {**UNBIASED, "biased": ("vit_small_patch16_dinov3_qkvb", TINY)}
"""Architectures by what they have beyond a plain ViT; the last one keeps the biases of q and v beside `qkv`."""


def tiny(kind: str) -> ViT:
    torch.manual_seed(0)
    name, options = KINDS[kind]
    vit = build(name, SIZE, options).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit


def outputs(vit: ViT) -> Tensor:
    cls, patches = encoded(vit, images())
    return torch.cat([cls[:, None], patches], 1)


def adapted(kind: str, *only: str) -> ViT:
    """Factors around 1 +- 0.3, in layers whose name ends in one of `only` or in all."""
    vit = tiny(kind)
    learnt = adapt(vit, IA3())
    with torch.no_grad():
        for name in learnt:
            if not only or name.removesuffix(".ia3_offset").endswith(only):
                vit.get_parameter(name).normal_(std=0.3)
    return vit


def factors(vit: ViT, block: int, layer: str) -> Tensor:
    return 1 + vit.get_parameter(f"blocks.{block}.{layer}.ia3_offset").detach()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_the_start_in_bf16_too(kind: str) -> None:
    vit, source = tiny(kind), tiny(kind)
    learnt = adapt(vit, IA3())
    assert len(learnt) == 3 * vit.depth
    assert torch.equal(outputs(vit), outputs(source))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(outputs(vit), outputs(source))
        assert vit.blocks[0].attn.qkv(torch.randn(2, vit.width)).dtype is torch.bfloat16


@torch.no_grad()
def test_a_block_is_the_papers() -> None:
    """k' = l_k * k, v' = l_v * v and h' = l_ff * act(W x), as equation 1 and the text below it have them."""
    vit = adapted("plain")
    block: Any = vit.blocks[0]
    l_k, l_v, l_ff = (factors(vit, 0, layer) for layer in ("attn.qkv", "attn.proj", "mlp.fc2"))
    x = torch.randn(5, vit.width)
    qkv = F.linear(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias)
    q, k, v = qkv.chunk(3, -1)
    q, k, v = (part.unflatten(1, (3, -1)).transpose(0, 1) for part in (q, l_k * k, l_v * v))
    mixed = ((q @ k.mT / 16**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
    y = x + F.linear(mixed, block.attn.proj.weight, block.attn.proj.bias)
    hidden = l_ff * F.gelu(F.linear(block.norm2(y), block.mlp.fc1.weight, block.mlp.fc1.bias))
    expected = y + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    assert_close(block(x, Layout((Group(1, 5),))), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def by_hand(kind: str, learnt: ViT) -> ViT:
    """The factors in the source's own tensors: rows and biases of keys and values, columns of fc2."""
    vit = tiny(kind)
    for index in range(vit.depth):
        block: Any = vit.blocks[index]
        l_k, l_v, l_ff = (factors(learnt, index, layer) for layer in ("attn.qkv", "attn.proj", "mlp.fc2"))
        rows = torch.cat([torch.ones_like(l_k), l_k, l_v])
        block.attn.qkv.weight.mul_(rows[:, None])
        if kind == "biased":
            block.attn.v_bias.mul_(l_v)
        elif kind != "dinov3":  # which has no biases here
            block.attn.qkv.bias.mul_(rows)
        block.mlp.fc2.weight.mul_(l_ff)
    return vit


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_the_published_places_give_the_same_outputs(kind: str) -> None:
    source, vit = tiny(kind), adapted(kind)
    before, expected = outputs(vit), outputs(by_hand(kind, vit))
    size = before.abs().max().item()
    assert not torch.allclose(before, outputs(source), atol=0.01 * size)
    assert_close(before, expected, atol=1e-5 * size, rtol=1e-5)
    x = torch.randn(2, vit.width)
    keys = vit.get_submodule("blocks.0.attn.qkv")(x)
    IA3().merge(vit)
    assert_close(vit.get_submodule("blocks.0.attn.qkv")(x), keys, atol=1e-5, rtol=1e-5)  # softmax hides their bias
    assert_close(outputs(vit), before, atol=1e-5 * size, rtol=1e-5)
    assert list(vit.state_dict()) == list(source.state_dict())
    assert {type(module) for module in vit.modules()} == {type(module) for module in source.modules()}


@torch.no_grad()
def test_factors_on_keys_are_as_good_as_factors_on_queries() -> None:
    vit, other = adapted("plain", "attn.qkv"), tiny("plain")
    for index in range(other.depth):
        block: Any = other.blocks[index]
        l_k = factors(vit, index, "attn.qkv")
        for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
            queries = tensor[: len(l_k)]
            queries.mul_(l_k.view(-1, *[1] * (queries.ndim - 1)))
    assert_close(outputs(vit), outputs(other), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs(vit), outputs(tiny("plain")), atol=1e-3)


@pytest.mark.parametrize(("size", "expected"), [("small", 27_648), ("base", 55_296), ("large", 147_456)])
def test_the_published_number_of_parameters_learns(size: str, expected: int) -> None:
    with torch.device("meta"):
        vit = build(f"vit_{size}_patch16_224", 224)
    assert sum(vit.get_parameter(name).numel() for name in adapt(vit, IA3())) == expected


@pytest.mark.parametrize("kind", ["biased", "swiglu"])
def test_what_was_learnt_can_be_saved_attached_and_taken_off(tmp_path: Path, kind: str) -> None:
    source = tiny(kind)
    merged = stage(tmp_path / "run", source, IA3())
    assert torch.equal(outputs(load_backbone(tmp_path / "run" / "backbone.safetensors").eval()), outputs(merged))
    attached = tiny(kind)
    attach(attached, tmp_path / "run" / "adapter.safetensors")
    assert torch.equal(outputs(attached), outputs(merged))
    vit = adapted(kind)
    unplug(vit, IA3())
    assert torch.equal(outputs(vit), outputs(source))


def test_factors_have_no_weight_decay() -> None:
    vit = tiny("plain")
    adapt(vit, IA3())
    config = DINOv2Config.model_validate({"head": {"prototypes": 16, "hidden": 8, "bottleneck": 4, "layers": 2}})
    groups = parameter_groups(OptimConfig(), DINOv2(config, vit, batch=4), 4)
    offsets = [p for name, p in vit.named_parameters() if name.endswith("ia3_offset")]
    decayed = {id(p) for group, parameters in groups.items() for p in parameters if group.decays}
    assert len(offsets) == 6
    assert not decayed & {id(p) for p in offsets}
