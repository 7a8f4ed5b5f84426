"""Filling a model from tensors: all are accounted for, none is left out in silence, and the advice fits the misfit."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import scatter
from torch import Tensor
from torch.testing import assert_close

from explora.errors import WeightsError
from explora.models import ViT, build, fill, fingerprint
from explora.models.vit import timm

NAME = "vit_tiny_patch16_224"
TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def tiny(image_size: int = 32, **options) -> ViT:
    torch.manual_seed(0)
    return scatter(build(NAME, image_size, {**TINY, **options}))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tiny().state_dict().items()}


def test_everything_loads_and_is_accounted_for(weights):
    vit = build(NAME, 32, TINY)
    account = fill(vit, {**weights, "head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}, "file")
    assert account.loaded == account.total == sum(tensor.numel() for tensor in weights.values())
    assert account.missing == account.resampled == ()
    assert account.unused == ("head.weight", "head.bias")
    assert "100.00 %" in str(account)
    assert fingerprint(vit.state_dict()) == fingerprint(weights)


def test_only_the_mask_token_may_be_missing(weights):
    del weights["mask_token"]
    account = fill(build(NAME, 32, TINY), weights, "file")
    assert account.missing == ("mask_token",)
    assert account.total - account.loaded == 32


def spoil(weights: dict[str, Tensor], name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    return {**weights, name: tensor} if tensor is not None else {k: v for k, v in weights.items() if k != name}


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("blocks.1.mlp.fc1.bias", None, "missing: blocks.1.mlp.fc1.bias"),
        ("blocks.3.norm1.weight", torch.ones(32), "no place for: blocks.3.norm1.weight"),
        ("headroom", torch.ones(32), "no place for: headroom"),
        ("norm.bias", torch.ones(31), r"norm.bias: \(31,\) in the file, \(32,\) in the model"),
        ("pos_embed", torch.ones(1, 19, 32), r"pos_embed \(1, 19, 32\) is not a square grid"),
        ("pos_embed", torch.ones(1, 17, 16), r"pos_embed \(1, 17, 16\)"),
        ("pos_embed", torch.ones(17), r"pos_embed \(17,\)"),
    ],
)
def test_a_partial_fit_names_the_tensor_and_changes_nothing(weights, name, tensor, says):
    vit = build(NAME, 32, TINY)
    before = fingerprint(vit.state_dict())
    with pytest.raises(WeightsError, match=says):
        fill(vit, spoil(weights, name, tensor), "file")
    assert fingerprint(vit.state_dict()) == before


BROKEN = [
    (lambda t: t.to_sparse(), "is sparse or nested; save it dense"),
    (lambda t: torch.complex(t, t), "holds complex64, where weights are floats"),
    (lambda t: t.long(), "holds int64, where weights are floats"),
    (lambda t: t > 0, "holds bool, where weights are floats"),
    (lambda t: torch.full_like(t, torch.nan), "not all values are finite in {}"),
    (lambda t: t.index_fill(0, torch.tensor([0]), torch.inf), "not all values are finite in {}"),
    (lambda t: t.half().index_fill(0, torch.tensor([0]), torch.nan), "not all values are finite in {}"),
    (lambda t: t.double() + 1e300, "not all values are finite in {}"),  # as float32
]


@pytest.mark.parametrize(("broken", "says"), BROKEN)
@pytest.mark.parametrize("name", ["norm.bias", "pos_embed", "blocks.1.attn.qkv.weight"])
def test_what_holds_no_finite_floats_is_refused_by_name(weights, name, broken, says):
    vit = build(NAME, 32, TINY)
    before = fingerprint(vit.state_dict())
    with pytest.raises(WeightsError, match=re.escape(name)) as error:
        fill(vit, {**weights, name: broken(weights[name])}, "file")
    assert says.format(name) in str(error.value)
    assert fingerprint(vit.state_dict()) == before


def test_heads_that_nobody_reads_may_hold_anything(weights):
    heads = {"head.weight": torch.full((5, 32), torch.nan), "head.order": torch.arange(5)}
    assert fill(build(NAME, 32, TINY), {**weights, **heads}, "file").unused == tuple(heads)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float8_e4m3fn, torch.double])
def test_floats_of_every_width_are_weights(weights, dtype):
    vit = build(NAME, 32, TINY)
    fill(vit, {name: tensor.to(dtype) for name, tensor in weights.items()}, "file")
    assert torch.equal(vit.norm.bias, weights["norm.bias"].to(dtype).float())


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("blocks.0.attn.qkv.lora_a", torch.ones(1), r"this is an adapter.*explora\.adapt\.attach"),
        ("patch_embed.proj.weight", torch.ones(32, 10, 8, 8), r"number of channels differs: model\.options\.in_chans"),
        ("patch_embed.proj.weight", torch.ones(32, 3, 4, 4), r"choose the model\.name"),
        ("norm.bias", None, r"choose the model\.name"),
    ],
)
def test_the_advice_fits_the_misfit(weights, name, tensor, says):
    with pytest.raises(WeightsError, match=says):
        fill(build(NAME, 32, TINY), spoil(weights, name, tensor), "file")


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"class_token": False}])
def test_positions_are_resampled_as_timm_does_at_load(options):
    large = tiny(48, **options)
    model = timm.create_model(NAME, num_classes=0, global_pool="", fc_norm=False, img_size=32, **{**TINY, **options})
    weights = {name: tensor for name, tensor in large.state_dict().items() if name != "mask_token"}
    theirs = timm.models.vision_transformer.checkpoint_filter_fn(dict(weights), model)
    vit = build(NAME, 32, {**TINY, **options})
    assert fill(vit, weights, "file").resampled == ("pos_embed",)
    assert vit.pos_embed is not None
    assert_close(vit.pos_embed.detach(), theirs["pos_embed"])
