"""Reading ExPLoRA releases, timm's files and folders, plain ViTs, and models with channel groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import NAME, SIZE, load, same, scatter, tiny
from torch import Tensor
from torch.testing import assert_close

from explora.errors import WeightsError
from explora.models import ViT, build
from explora.models.formats import dinov2
from explora.models.vit import timm

# ExPLoRA releases


def released(vit: ViT, *, split: bool = True) -> dict[str, Tensor]:
    """As the official code saves a merged model: projections beside the fused `qkv`."""
    tensors = dinov2.write(vit) if "blocks.0.ls1.gamma" in vit.state_dict() else dict(vit.state_dict())
    if "blocks.0.ls1.gamma" not in tensors:
        del tensors["mask_token"]
    for name in [name for name in tensors if ".attn.qkv." in name and split]:
        for part, tensor in zip("qkv", tensors[name].chunk(3), strict=True):
            tensors[name.replace(".qkv.", f".{part}_proj.")] = tensor.clone()
    return tensors


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("objective", ["dinov2", "mae"])
def test_an_explora_release_gives_its_merged_projections(objective: str, wrapped: bool, tmp_path: Path) -> None:
    vit = tiny(**({"init_values": 0.5} if objective == "dinov2" else {}))
    tensors: Any = released(vit)
    if wrapped and objective == "dinov2":
        heads = {"dino_head.mlp.0.weight": torch.ones(3, 64)}
        tensors = {"teacher": {**{f"backbone.{name}": tensor for name, tensor in tensors.items()}, **heads}}
    elif wrapped:
        tensors = {"model": tensors, "epoch": 3}
    torch.save(tensors, tmp_path / "explora.pth")
    found, account, *_ = load(tmp_path / "explora.pth", name=NAME, options=vit.options)
    assert same(found, vit, *["mask_token"] * (objective == "mae"))
    assert account is not None
    assert sum("_proj." in name for name in account.unused) == 2 * 6
    assert found.source.format == "explora-release"
    assert found.position_mode == ("official" if objective == "dinov2" else "timm")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t["blocks.1.attn.v_proj.weight"].add_(1e-3),
            r"blocks\.1\.attn\.v_proj\.weight differs from its third",
        ),
        (lambda t: t.update({"blocks.1.mlp.fc1.lora_A": torch.ones(1)}), "still hold low-rank factors"),
        (
            lambda t: t.update({"blocks.1.attn.v_proj.lora_A": t["blocks.1.attn.v_proj.weight"].add_(1e-3)[:1]}),
            r"blocks\.1\.attn\.v_proj\.weight differs from its third",
        ),
        (lambda t: t.pop("blocks.1.attn.qkv.bias"), "there is no fused qkv of its size beside it"),
    ],
)
def test_an_explora_file_that_was_not_merged_is_refused(change: Any, says: str, tmp_path: Path) -> None:
    tensors = released(tiny(init_values=0.5))
    change(tensors)
    torch.save(tensors, tmp_path / "explora.pth")
    with pytest.raises(WeightsError, match=says):
        load(tmp_path / "explora.pth")


def test_factors_beside_the_projections_they_were_merged_into_are_named_and_left(tmp_path: Path) -> None:
    vit = tiny(init_values=0.5)
    tensors = released(vit)
    factors = {
        f"blocks.{block}.attn.{part}_proj.lora_{letter}": torch.ones(2, 2)
        for block in (0, 1)
        for part in "qv"
        for letter in "AB"
    }
    torch.save({"teacher": {**tensors, **factors}}, tmp_path / "explora.pth")
    found, account, *_ = load(tmp_path / "explora.pth", name=NAME, options=vit.options)
    assert same(found, vit)
    assert account is not None
    assert set(factors) <= set(account.unused)
    assert "which mean and std" in str(load(tmp_path / "explora.pth").account)


# timm's names and plain ViTs


TIMM = [
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_small_patch16_dinov3_qkvb",
    "vit_base_patch16_dinov3",
    "vit_large_patch16_dinov3",  # of two data sets with two means
    "vit_base_patch16_224",
    "vit_large_patch14_224",
    "vit_huge_patch14_224",
    "vit_small_patch32_224",
    "vit_giant_patch14_224",
]


@pytest.mark.parametrize("name", TIMM)
def test_timms_own_files_need_no_name(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
        torch.save(model.state_dict(), tmp_path / "x.pth")
        vit, account, *_ = load(tmp_path / "x.pth")
    assert account is not None
    assert (vit.name, vit.options, account.missing) == (name, {}, ("mask_token",))
    assert vit.position_mode == "timm"
    assert vit.blocks[0].attn.num_heads == model.blocks[0].attn.num_heads  # type: ignore[union-attr]
    assert ("which mean and std" in str(account)) == ("dino" not in name or "large" in name)


@pytest.mark.parametrize("patch", [14, 16])
@torch.no_grad()
def test_a_gated_mlp_under_timms_names_is_dinov2s(patch: int, tmp_path: Path) -> None:
    options = {"patch_size": patch, "embed_dim": 384, "depth": 1, "num_heads": 6, "img_size": 2 * patch}
    model = timm.create_model("vit_giant_patch14_dinov2", num_classes=0, **options).eval()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    vit, account, *_ = load(tmp_path / "x.pth")
    assert account is not None
    assert (vit.name, account.missing, account.unused) == ("vit_giant_patch14_dinov2", ("mask_token",), ())
    images = torch.randn(1, 3, 2 * patch, 2 * patch)
    assert_close(vit.eval()([images])[0].cls_BD, model.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mean", [None, [0.1, 0.2, 0.3]])
def test_a_folder_of_timms_hub_names_its_architecture(mean: list[float] | None, tmp_path: Path) -> None:
    model = timm.create_model(NAME, depth=1, embed_dim=96, img_size=SIZE)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    pretrained = {
        "tag": "augreg_in21k_ft_in1k",
        "license": "apache-2.0",
        **({"mean": mean, "std": mean} if mean else {}),
    }
    arguments = {"depth": 1, "embed_dim": 96, "img_size": SIZE}
    config = {"architecture": NAME, "model_args": arguments, "pretrained_cfg": pretrained}
    (tmp_path / "config.json").write_text(json.dumps(config))
    vit, account, *_ = load(tmp_path)
    assert (vit.name, vit.image_size) == ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", SIZE)
    assert vit.source.licence == "apache-2.0"
    assert vit.options == {"depth": 1, "embed_dim": 96}
    assert vit.mean == vit.std == tuple(mean or [0.5] * 3)
    assert "which mean and std" not in str(account)


def test_a_name_ends_the_doubt_about_mean_and_std(tmp_path: Path) -> None:
    save_file(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "x.safetensors")
    alone = load(tmp_path / "x.safetensors")
    told = load(tmp_path / "x.safetensors", name="deit_tiny_patch16_224", options={"depth": 1})
    assert "unless model.name says another" in str(alone.account)
    assert "mean and std" not in str(told.account)
    assert alone.vit.mean == (0.5, 0.5, 0.5)
    assert told.vit.mean != alone.vit.mean


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch16_clip_224", {}),
        (NAME, {"qk_norm": True}),
        (NAME, {"class_token": False, "global_pool": "avg"}),
        (NAME, {"embed_dim": 96}),
    ],
)
def test_what_shapes_do_not_tell_asks_for_a_name(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(name, **{"embed_dim": 128, "depth": 1, "num_heads": 2, **options})
    torch.save(model.state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"model\.name is needed: the weights do not tell it"):
        load(tmp_path / "x.pth")


def test_an_mae_is_known_by_its_fixed_positions(tmp_path: Path) -> None:
    tensors = dict(timm.create_model("vit_base_patch16_224", num_classes=0, depth=1).state_dict())
    tensors["pos_embed"][:, 0] = 0
    torch.save(tensors, tmp_path / "flat.pth")
    found = load(tmp_path / "flat.pth")
    assert found.vit.source.format == "mae"
    assert found.vit.name == "vit_base_patch16_224.mae"
    assert found.vit.source.inferred
    assert "taken for an MAE by its fixed sin-cos positions" in str(found.account)
    tensors["pos_embed"][:, 0] = 1
    torch.save({"model": tensors}, tmp_path / "wrapped.pth")
    assert "taken for an MAE by its outer key" in str(load(tmp_path / "wrapped.pth").account)


# What holds no weights


@pytest.mark.parametrize(
    ("name", "broken", "says"),
    [
        ("cls_token", lambda t: t.to_sparse(), "is sparse"),
        ("cls_token", lambda t: t.long(), "holds int64"),  # a reader adds floats to it
        ("cls_token", lambda t: torch.complex(t, t), "holds complex64"),
        ("cls_token", lambda t: t * torch.nan, "not all values are finite"),
        ("blocks.0.mlp.fc1.weight", lambda t: t / 0, "not all values are finite"),
    ],
)
def test_readers_get_dense_floats_alone(name: str, broken: Any, says: str, tmp_path: Path) -> None:
    tensors = dinov2.write(tiny("vit_small_patch14_reg4_dinov2"))
    torch.save({**tensors, name: broken(tensors[name])}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=rf"{says}.*{name}|{name} {says}"):
        load(tmp_path / "x.pth", options={"num_heads": 2})


def test_a_decoder_that_diverged_is_refused(tmp_path: Path) -> None:
    tensors = {**tiny().state_dict(), "mask_token": torch.ones(1, 1, 32)}
    torch.save({"model": {**tensors, "decoder_embed.weight": torch.full((2, 2), torch.nan)}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"not all values are finite in decoder_embed\.weight"):
        load(tmp_path / "x.pth", options={"num_heads": 2})


# Channel groups


GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
MAE = {"embed_dim": 64, "depth": 2, "num_heads": 1, "patch_size": 8}


def test_a_grouped_model_takes_all_but_its_embeddings_from_an_rgb_mae(tmp_path: Path) -> None:
    rgb = tiny(num_heads=1)
    tensors = {name: tensor for name, tensor in rgb.state_dict().items() if name != "mask_token"}
    tensors["pos_embed"][:, 0] = 0
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    torch.manual_seed(1)
    vit, account, *_ = load(tmp_path / "mae.pth", channel_groups=GROUPS)
    assert account is not None
    assert (vit.name, vit.channels, vit.groups) == ("vit_base_patch16_224.mae", 10, 3)
    convs = {f"patch_embed.{group}.proj.{kind}" for group in range(3) for kind in ("weight", "bias")}
    assert set(account.fresh) == {"channel_embed", "pos_embed", *convs}
    assert set(account.unused) == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    state = vit.state_dict()
    fresh = sum(state[name].numel() for name in account.fresh)
    assert account.loaded == account.total - fresh - vit.width
    assert "fresh: " in str(account)
    kept = {name for name in state if name not in account.fresh and name != "mask_token"}
    assert all(torch.equal(state[name], tensors[name]) for name in kept)
    del tensors["blocks.1.norm1.bias"]
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.norm1\.bias"):
        load(tmp_path / "mae.pth", channel_groups=GROUPS)


def test_a_satmae_file_is_read_with_its_groups(tmp_path: Path) -> None:
    vit = scatter(build("vit_base_patch16_224.mae", SIZE, {**MAE, "in_chans": 10}, channel_groups=GROUPS))
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}
    extra = {"mask_token": torch.ones(1, 1, 32), "decoder_channel_embed": torch.ones(1, 4, 8)}
    torch.save({"model": {**tensors, **extra, "channel_cls_embed": torch.zeros(1, 1, 16)}}, tmp_path / "x.pth")
    found, account, decoder, _ = load(tmp_path / "x.pth")
    assert found.channel_groups == GROUPS
    assert same(found, vit, "mask_token")
    assert account is not None
    assert (account.fresh, account.unused) == ((), ("channel_cls_embed",))
    assert decoder.keys() == {"decoder_mask_token", "decoder_channel_embed"}


def test_groups_of_other_sizes_must_be_said(tmp_path: Path) -> None:
    groups = ((0, 1), (2, 3, 4))
    vit = scatter(build("vit_base_patch16_224.mae", SIZE, {**MAE, "in_chans": 5}, channel_groups=groups))
    torch.save({"model": vit.state_dict()}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"model\.channel_groups is needed"):
        load(tmp_path / "x.pth")
    assert same(load(tmp_path / "x.pth", channel_groups=groups).vit, vit)


def test_a_channel_embedding_of_another_width_is_taken_over(tmp_path: Path) -> None:
    """SatMAE-B has SatMAE-L's 256 columns of 768."""
    options = {**MAE, "in_chans": 10}
    vit = scatter(build("vit_base_patch16_224.mae", SIZE, options, channel_groups=GROUPS, channel_width=32))
    assert (vit.channel_embed.shape, vit.pos_embed.shape) == ((1, 3, 32), (1, 17, 32))
    tensors = {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}
    torch.save({"model": tensors}, tmp_path / "x.pth")
    found, account, *_ = load(tmp_path / "x.pth")
    assert same(found, vit, "mask_token")
    assert "channel groups taken as SatMAE's [[0, 1, 2, 6], [3, 4, 5, 7], [8, 9]]" in str(account)
    images = torch.randn(1, 10, SIZE, SIZE)
    assert torch.equal(found.eval()([images])[0].cls_BD, vit.eval()([images])[0].cls_BD)
    torch.save({"model": {**tensors, "channel_embed": torch.ones(1, 3, 17)}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="channel_embed is 17 wide, which sines and cosines"):
        load(tmp_path / "x.pth")
