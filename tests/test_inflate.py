"""Weights for other bands: kernels by name, else their mean, against loops and closed forms; what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NAME, SIZE, TINY, load, same, tiny
from test_mae_decoder import SENTINEL, tiny_decoder
from tiny_dinov2 import HEAD, at
from torch import Tensor
from torch.testing import assert_close

from explora.adapt import ExPLoRA, adapt, attach
from explora.bands import RGB, SENTINEL2, Scaling
from explora.config import load as load_config
from explora.config import validate
from explora.errors import ConfigError, WeightsError
from explora.models import ModelConfig, ViT, build, load_model
from explora.models.export import save_adapter, save_backbone
from explora.models.inflate import inflate
from explora.objectives import MAE, DINOv2, DINOv2Config, MAEConfig

ALL = tuple(SENTINEL2)
BGR = ("B02", "B03", "B04")
KERNEL = "patch_embed.proj.weight"
DEIT = Path(os.environ.get("EXPLORA_SHARED", "../shared")) / "data/weights/deit_tiny_patch16_224.in1k.safetensors"
orders = st.lists(st.sampled_from(ALL), min_size=1, max_size=6, unique=True)


@pytest.fixture
def rgb(tmp_path: Path) -> tuple[Path, ViT]:
    """A saved model of red, green, blue."""
    vit = tiny()
    vit.mean, vit.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    return save_backbone(tmp_path / "rgb.safetensors", vit), vit


def grey(channels: int, size: int = SIZE) -> Tensor:
    """The same image in every channel."""
    return torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(3)).expand(-1, channels, -1, -1)


@torch.no_grad()
def seen(vit: ViT, images: Tensor) -> Tensor:
    return vit.eval().features(images).patches


# The rule


@given(orders, orders)
@settings(max_examples=60, deadline=None)
def test_kernels_are_those_of_loops(have: list[str], want: list[str]) -> None:
    kernel = torch.randn(4, len(have), 2, 2, generator=torch.Generator().manual_seed(len(have)))
    found = inflate(kernel, have, want)
    assert found.shape == (4, len(want), 2, 2)
    moved = set(have) == set(want)
    for channel, band in enumerate(want):
        for place in range(4):
            values = [float(kernel[place, k, 1, 0]) for k in range(len(have))]
            value = values[have.index(band)] if band in have else sum(values) / len(values)
            expected = value if moved else value * len(have) / len(want)
            assert float(found[place, channel, 1, 0]) == pytest.approx(expected, rel=1e-6, abs=1e-7)
    if moved:
        assert torch.equal(found, torch.stack([kernel[:, have.index(band)] for band in want], 1))


@given(st.lists(st.sampled_from([b for b in ALL if b not in RGB]), min_size=1, unique=True), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_grey_image_gives_what_it_gave(others: list[str], named: bool) -> None:
    """Sum of the kernels: 3/N (S + (N - 3) S / 3) = S where all three are named; 3/N * N S / 3 = S where none is."""
    want = [*others[:1], *RGB, *others[1:]] if named else others
    kernel = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    assert_close(inflate(kernel, RGB, want).sum(1), kernel.sum(1), rtol=0, atol=2e-6)


def test_the_factor_is_timms() -> None:
    from timm.models import adapt_input_conv

    kernel = torch.ones(2, 3, 2, 2)
    assert_close(inflate(kernel, RGB, ALL), adapt_input_conv(13, kernel))


# Loading


def test_thirteen_bands_from_three(rgb: tuple[Path, ViT]) -> None:
    path, vit = rgb
    found, account, *_ = load(path, bands=ALL)
    assert account is not None
    assert (found.channels, found.bands, found.options["in_chans"]) == (13, ALL, 13)
    assert (account.loaded, account.missing, account.unused, account.fresh) == (account.total, (), (), ())
    words = f"{KERNEL} inflated from B04, B03, B02: 3 bands by name, 10 from their mean, times 3/13"
    assert words in str(account)
    assert "100.00 %" in str(account)
    assert same(found, vit, KERNEL)
    assert torch.equal(found.get_parameter(KERNEL), inflate(vit.get_parameter(KERNEL), RGB, ALL))
    assert_close(seen(found, grey(13)), seen(vit, grey(3)), rtol=1e-5, atol=1e-5)
    assert (found.mean, found.std, found.scaling) == ((0.0,) * 13, (1.0,) * 13, None)
    assert "mean and std are given for 3 channels, but the model has 13 others" in str(account)


def test_bands_that_differ_give_a_convolution_band_by_band(rgb: tuple[Path, ViT]) -> None:
    path, vit = rgb
    found = load(path, bands=["nir", "red", "VV"]).vit
    assert found.bands == ("B08", "B04", "VV")
    images = torch.randn(2, 3, SIZE, SIZE)
    kernel = vit.get_parameter(KERNEL)
    parts = [kernel.mean(1), kernel[:, 0], kernel.mean(1)]
    bias = vit.get_parameter("patch_embed.proj.bias")[None, :, None, None]
    expected = bias + sum(F.conv2d(images[:, c : c + 1], part[:, None], stride=8) for c, part in enumerate(parts))
    assert_close(found.patch_embed.proj(images), expected, rtol=1e-5, atol=1e-5)  # type: ignore[operator]
    assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)


def test_another_order_moves_everything(rgb: tuple[Path, ViT], tmp_path: Path) -> None:
    path, vit = rgb
    vit.scaling = Scaling(unit="reflectance", low=(0, 0.01, 0.02), high=(0.3, 0.4, 0.5))
    found, account, *_ = load(save_backbone(path, vit), bands=["blue", "green", "red"])
    images = torch.randn(2, 3, SIZE, SIZE)
    assert_close(seen(found, images.flip(1)), seen(vit, images), rtol=1e-6, atol=1e-6)
    assert (found.mean, found.std, found.bands) == ((0.3, 0.2, 0.1), (0.6, 0.5, 0.4), BGR)
    assert found.scaling == Scaling(unit="reflectance", low=(0.02, 0.01, 0), high=(0.5, 0.4, 0.3))
    assert f"{KERNEL} has its kernels in the order B02, B03, B04, B04, B03, B02 in the weights" in str(account)
    again = load(save_backbone(tmp_path / "bgr.safetensors", found), bands=RGB).vit
    assert same(again, vit)
    assert (again.mean, again.scaling) == (vit.mean, vit.scaling)


def test_fewer_bands_keep_what_is_known_of_them(rgb: tuple[Path, ViT], tmp_path: Path) -> None:
    wide = load(rgb[0], bands=ALL).vit
    wide.mean = tuple(n / 20 for n in range(13))
    wide.scaling = Scaling(unit="dn", low=tuple(range(13)), high=(3000,) * 13)
    path = save_backbone(tmp_path / "wide.safetensors", wide)
    found, account, *_ = load(path, bands=RGB)
    places = [ALL.index(band) for band in RGB]
    assert torch.equal(found.get_parameter(KERNEL), wide.get_parameter(KERNEL)[:, places] * (13 / 3))
    assert found.mean == tuple(wide.mean[place] for place in places)
    assert found.scaling == Scaling(unit="dn", low=tuple(places), high=(3000,) * 3)
    assert "made from B01, B02, " in str(account)
    assert "3 bands by name, times 13/3" in str(account)
    assert load(path).vit.bands == ALL
    assert same(load(path, bands=ALL).vit, wide)


def test_random_weights_take_any_bands() -> None:
    one: dict[str, Any] = {"name": NAME, "options": TINY, "image_size": SIZE}
    assert load_model(ModelConfig(**one)).vit.bands == RGB
    assert load_model(ModelConfig(**one, bands=ALL)).vit.channels == 13
    vit = build("vit_small_patch14_dinov2", 28, {"depth": 1}, bands=BGR)
    assert (vit.mean, vit.std) == ((0.406, 0.456, 0.485), (0.225, 0.224, 0.229))


def test_unnamed_bands_can_be_named_but_not_inflated(tmp_path: Path) -> None:
    torch.save(tiny(in_chans=4, depth=2).state_dict(), tmp_path / "x.pth")
    model: dict[str, Any] = {"name": NAME, "options": TINY}
    assert load(tmp_path / "x.pth", name=NAME, options={**TINY, "in_chans": 4}).vit.bands is None
    found, account, *_ = load(tmp_path / "x.pth", **model, bands=["B02", "B03", "B04", "B08"])
    assert found.bands == ("B02", "B03", "B04", "B08")
    assert "do not name their 4 bands: taken as those of model.bands, in this order" in str(account)
    grouped = load(tmp_path / "x.pth", **model, bands=["B02", "B03", "B04", "B08"], channel_groups=[(0, 2), (3, 1)]).vit
    expected = inflate(found.get_parameter(KERNEL), found.bands, ("B08", "B03"))
    assert torch.equal(grouped.get_parameter("patch_embed.1.proj.weight"), expected)
    with pytest.raises(WeightsError, match=r"of which bands its 4 channels are, so that it cannot be fitted to the 13"):
        load(tmp_path / "x.pth", **model, bands=ALL)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"options": {"in_chans": 3}}, r"names 13 bands, but model\.options\.in_chans says 3 channels"),
        ({"channel_groups": SENTINEL}, "names 13 bands, but the channel groups have 10 channels"),
    ],
)
def test_what_contradicts_itself_is_refused(rgb: tuple[Path, ViT], config: dict[str, Any], says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        load(rgb[0], bands=ALL, **config)
    with pytest.raises(WeightsError, match=r"model\.bands names 2 bands, but the model takes 3 channels"):
        build(NAME, SIZE, TINY, bands=("B02", "B03"))


@pytest.mark.parametrize(("bands", "says"), [(["red", "B4"], "band B04 is named more than once"), ([], "at least 1")])
def test_bands_are_named_once(bands: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"bands: .*{says}"):
        validate(ModelConfig, {"name": NAME, "bands": bands}, "model")


# Channel groups


def test_each_group_is_inflated_by_itself(rgb: tuple[Path, ViT], tmp_path: Path) -> None:
    path, vit = rgb
    bands = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
    found, account, *_ = load(path, bands=bands, channel_groups=SENTINEL)
    assert account is not None
    assert set(account.fresh) == {"pos_embed", "channel_embed"}
    assert set(account.unused) == {"pos_embed"}
    for words in (
        "patch_embed.0.proj.weight inflated from B04, B03, B02: 3 bands by name, 1 from their mean, times 3/4",
        "patch_embed.2.proj.weight made from B04, B03, B02: 2 from their mean, times 3/2",
    ):
        assert words in str(account)
    kernel, bias = (vit.get_parameter(f"patch_embed.proj.{kind}") for kind in ("weight", "bias"))
    for number, group in enumerate(SENTINEL):
        expected = inflate(kernel, RGB, [bands[channel] for channel in group])
        assert torch.equal(found.get_parameter(f"patch_embed.{number}.proj.weight"), expected)
        assert torch.equal(found.get_parameter(f"patch_embed.{number}.proj.bias"), bias)
    again = load(save_backbone(tmp_path / "grouped.safetensors", found)).vit
    assert same(again, found)
    assert (again.bands, again.channel_groups) == (bands, SENTINEL)
    with pytest.raises(WeightsError, match=r"has channel groups of B02, .*leave model\.bands out"):
        load(tmp_path / "grouped.safetensors", bands=bands[::-1])


def test_groups_of_other_patches_begin_anew(rgb: tuple[Path, ViT]) -> None:
    options = {**TINY, "patch_size": 4}
    account = load(rgb[0], name=NAME, options=options, bands=ALL[:10], channel_groups=SENTINEL).account
    assert account is not None
    assert "patch_embed.0.proj.weight" in account.fresh


def test_groups_begin_anew_unless_bands_are_named(rgb: tuple[Path, ViT]) -> None:
    account = load(rgb[0], channel_groups=((0,), (1, 2))).account
    assert account is not None
    assert {"patch_embed.0.proj.weight", "patch_embed.1.proj.bias"} <= set(account.fresh)
    named = load(rgb[0], channel_groups=((0,), (1, 2)), bands=RGB).account
    assert named is not None
    assert set(named.fresh) == {"pos_embed", "channel_embed"}


# What trains


def test_an_adapter_goes_back_on_the_inflated_base(rgb: tuple[Path, ViT], tmp_path: Path) -> None:
    path, method = rgb[0], ExPLoRA(rank=2, alpha=4)
    vit = load(path, bands=ALL).vit
    learnt = adapt(vit, method)
    vit.mean, vit.scaling = (0.5,) * 13, Scaling(unit="reflectance", low=(0.0,) * 13, high=(0.4,) * 13)
    with torch.no_grad():
        for name in learnt:
            vit.get_parameter(name).add_(0.1)
    adapter = save_adapter(tmp_path / "adapter.safetensors", vit, learnt, method.model_dump(mode="json"))
    method.merge(vit)
    again = load(path, bands=ALL).vit
    attach(again, adapter)
    images = torch.randn(2, 13, SIZE, SIZE)
    assert torch.equal(seen(again, images), seen(vit, images))
    with pytest.raises(WeightsError, match=r"other bands; load the base with model\.bands: \[B01, B02, "):
        attach(load(path).vit, adapter)


def test_dinov2_learns_from_thirteen_bands(tmp_path: Path) -> None:
    vit = load(save_backbone(tmp_path / "x.safetensors", tiny(init_values=0.5)), bands=ALL).vit
    adapt(vit, ExPLoRA(rank=2, alpha=4, mask_token=True, patch_embed=True))
    made = DINOv2(load_config(DINOv2Config, {"head": HEAD}), vit, 4)
    torch.manual_seed(0)
    mask = torch.rand(2, 4, 16) < 0.4
    batch = {"global": torch.randn(2, 4, 13, 32, 32), "local": torch.randn(2, 4, 13, 16, 16), "mask": mask}
    (target,) = made.targets([batch], at(9))
    output = made(batch, target, at(9))
    output.loss.backward()
    gradient = vit.get_parameter(KERNEL).grad
    assert output.loss.isfinite()
    assert gradient is not None
    assert bool((gradient.flatten(2).abs().amax((0, 2)) > 0).all())  # of every band


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("bands", [ALL, BGR, ("VV", "VH", "B02")])
def test_mae_decoders_predict_the_models_bands(tmp_path: Path, decoder: bool, bands: tuple[str, ...]) -> None:
    tensors = tiny(embed_dim=64, patch_size=16).state_dict()
    decodes = tiny_decoder(width=32, patch=16, side=14, encoder=64) if decoder else {}
    torch.save({"model": {**{n: t for n, t in tensors.items() if n != "mask_token"}, **decodes}}, tmp_path / "mae.pth")
    loaded = load(tmp_path / "mae.pth", name=NAME, options={**TINY, "patch_size": 16}, bands=bands)
    adapt(loaded.vit, ExPLoRA(rank=2, patch_embed=True))
    config = MAEConfig(decoder={"heads": 2, **({} if decoder else {"width": 32, "depth": 1})})
    made = MAE(config, loaded.vit, loaded.decoder, loaded.decoder_heads)
    anew = "" if bands == BGR else "the decoder's pred.* begin anew"
    assert made.decoder.anew == (anew if decoder else "a fresh decoder")
    if bands == BGR and decoder:
        rows = decodes["decoder_pred.weight"].unflatten(0, (-1, 3)).flip(1).flatten(0, 1)
        assert torch.equal(made.decoder.get_parameter("pred.weight"), rows)
    batch = {"image": torch.randn(2, len(bands), 64, 64), "noise": torch.rand(2, 16)}
    (target,) = made.targets([batch], at(9))
    assert made(batch, target, at(9)).loss.isfinite()


# Published weights


@pytest.mark.skipif(not DEIT.exists(), reason="EXPLORA_SHARED has no data/weights here")
def test_deit_sees_thirteen_bands_of_grey_as_three() -> None:
    plain, (vit, account, *_) = load(DEIT).vit, load(DEIT, bands=ALL)
    assert account is not None
    assert (account.missing, account.fresh, account.loaded) == (("mask_token",), (), account.total - 192)
    assert "3 bands by name, 10 from their mean, times 3/13" in str(account)
    assert (vit.bands, vit.mean) == (ALL, (0.0,) * 13)
    ours, theirs = seen(vit.double(), grey(13, 224).double()), seen(plain.double(), grey(3, 224).double())
    assert_close(ours, theirs, rtol=0, atol=1e-5)
