"""Methods that add nothing, against published and closed-form counts; and how what learns is told to people."""

from __future__ import annotations

import copy
from functools import cache
from itertools import pairwise

import pytest
import torch
from test_methods import METHODS, made, tiny

from explora.adapt import Bias, ExPLoRA, Frozen, Full, Last, LoRA, Method, Norms, adapt
from explora.errors import ConfigError
from explora.models import ViT, build
from explora.stages.training import families

S, B, L = "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"
D = 768


@cache
def fresh(name: str, **options: object) -> ViT:
    with torch.device("meta"):
        return build(name, 224, options)


@cache
def learnt(name: str, method: Method) -> dict[str, int]:
    """Elements of each parameter that learns."""
    vit = copy.deepcopy(fresh(name))
    return {key: vit.get_parameter(key).numel() for key in adapt(vit, method)}


# forgetting-methods.md, A3, A5 and C5, without heads


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        (B, Last(blocks=3), 21_340_516 - 76_900),
        (B, Last(), 7_087_872),
        (B, Last(norm=True), 7_087_872 + 2 * D),
        (B, Last(blocks=12), 12 * 7_087_872),
        (S, Last(), 1_774_464),
        (L, Last(), 12_596_224),
        (S, Norms(), 19_200),
        (B, Norms(), 38_400),
        (L, Norms(), 100_352),
        (B, LoRA(rank=4), 224_356 - 76_900),
        (B, LoRA(rank=8), 371_812 - 76_900),
        (B, LoRA(rank=16), 666_724 - 76_900),
        (B, LoRA(rank=1), 36_864),
        (B, Bias(), 12 * 11 * D + 2 * D),
        (B, Full(), 85_798_656 + D),  # and the mask token
        (B, Frozen(), 0),
    ],
)
def test_counts_are_the_published_ones(name, method, expected):
    assert sum(learnt(name, method).values()) == expected


def test_last_counts_from_the_output():
    assert {name.split(".")[1] for name in learnt(B, Last(blocks=3))} == {"9", "10", "11"}
    assert set(learnt(B, Last(blocks=2, norm=True))) - set(learnt(B, Last(blocks=2))) == {"norm.weight", "norm.bias"}
    with pytest.raises(ConfigError, match=r"^adapt\.blocks: 3 of a model of 2 blocks; use 1 to 2"):
        adapt(tiny(), Last(blocks=3))


def test_norms_and_biases_are_told_by_their_modules():
    """The names of parameters are a convention, the classes of modules are not."""
    vit = fresh("vit_small_patch14_reg4_dinov2", depth=2, qk_norm=True)
    norms = {
        f"{place}.{name}"
        for place, module in vit.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    assert {"blocks.1.attn.k_norm.weight", "blocks.0.norm2.bias", "norm.weight"} < norms
    assert set(adapt(vit, Norms())) == norms
    assert set(adapt(vit, Bias())) == {
        f"{place}.bias" for place, module in vit.named_modules() if getattr(module, "bias", None) is not None
    }


def test_biases_that_stand_apart_learn_too():
    vit = fresh("vit_small_patch16_dinov3_qkvb", depth=1)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias"} < set(adapt(vit, Bias()))


@pytest.mark.parametrize("name", METHODS)
def test_no_element_counts_twice(name):
    vit = tiny()
    parameters = [vit.get_parameter(key) for key in adapt(vit, made(name))]
    parameters += [p for p in vit.parameters() if not p.requires_grad]
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in parameters)
    assert len(spans) == sum(1 for _ in vit.parameters())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


# What people read of it

LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Frozen(), []),
        (LoRA(dora=True), ["blocks.*.attn.qkv.lora*"]),
        (
            ExPLoRA(),
            [
                *["cls_token", "blocks.*.norm1.weight", "blocks.*.norm1.bias", "blocks.*.attn.qkv.lora*"],
                *["blocks.*.norm2.weight", "blocks.*.norm2.bias"],
                *[f"blocks.11.{layer}.{last}" for layer in LAYERS for last in ("weight", "bias")],
                *["norm.weight", "norm.bias"],
            ],
        ),
        (ExPLoRA(blocks=(3, 7, 8, 9), norms=False, targets=(), cls_token=False), "blocks.3,7-9."),
        (Last(), "blocks.11."),
        (Last(blocks=3), "blocks.9-11."),
        (Last(blocks=6), "blocks.6-11."),
        (Last(blocks=7), "blocks.*."),
        (
            Bias(),
            [
                *["patch_embed.proj.bias", "blocks.*.norm1.bias", "blocks.*.attn.qkv.bias", "blocks.*.attn.proj.bias"],
                *["blocks.*.norm2.bias", "blocks.*.mlp.fc1.bias", "blocks.*.mlp.fc2.bias", "norm.bias"],
            ],
        ),
    ],
)
def test_names_are_few_and_true(method, expected):
    found = families(learnt(B, method))
    if isinstance(expected, list):
        assert found == expected
    else:
        assert len(found) == 12
        assert all(name.startswith(expected) for name in found)


def test_two_of_two_are_told_by_number():
    assert families(["blocks.0.norm1.weight", "blocks.1.norm1.weight"]) == ["blocks.0-1.norm1.weight"]
    groups = [f"patch_embed.{group}.proj.weight" for group in range(3)]
    assert families(["pos_embed", *groups]) == ["pos_embed", "patch_embed.*.proj.weight"]
