"""What names and shapes do not tell of published checkpoints: mean and std, heads, positions; no silent guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import IMAGENET, NEEDS_KEYS, SATELLITES, checkpoint, doubt, file_of, load_shapes
from small_models import load
from torch.testing import assert_close

from explora.models.vit import timm

pytestmark = NEEDS_KEYS
S14 = "dinov2_vits14_pretrain"
REG = "dinov2_vits14_reg4_pretrain"


@pytest.mark.parametrize("renamed", [False, True])
def test_satellite_weights_get_their_mean_and_std(renamed: bool, tmp_path: Path) -> None:
    """ViT-L by its untied norm; the 7B by the name of its file alone, without which there is a note."""
    for name in ("dinov3_vitl16_pretrain_sat493m", "dinov3_vit7b16_pretrain_sat493m"):
        path = tmp_path / ("x.pth" if renamed else f"{name}-a6675841.pth")
        vit, account, *_ = load_shapes(file_of(name, checkpoint(name, device="meta"), path))
        known = "vitl" in name or not renamed
        assert vit.name.endswith(".sat493m") == known
        assert (vit.mean, vit.std) == (SATELLITES if known else IMAGENET)
        assert account is not None
        assert account.notes == (() if known else (doubt(vit),))


@pytest.mark.parametrize("name", ["mae_pretrain_vit_base", "mae_visualize_vit_base", "dinov2_vits14_pretrain"])
def test_a_renamed_or_cut_file_may_come_from_other_images(name: str, tmp_path: Path) -> None:
    depth = 11 if "dinov2" in name else 99
    vit, account, *_ = load_shapes(file_of(name, checkpoint(name, depth=depth, device="meta"), tmp_path / "x.pth"))
    assert doubt(vit) in str(account)
    told = load_shapes(tmp_path / "x.pth", name=vit.name, options=vit.options)
    assert "mean and std" not in str(told.account)


@pytest.mark.parametrize(
    ("name", "depth", "heads", "note"),
    [
        ("mae_pretrain_vit_huge", 2, 16, "heads taken as 16, as in published models of width 1280"),
        ("mae_pretrain_vit_huge", 99, 16, None),
        ("dinov3_vith16plus_pretrain_lvd1689m", 2, 20, None),  # its rotary periods tell
        ("dinov3_vit7b16_pretrain_lvd1689m", 2, 32, None),
        ("dinov2_vitg14_pretrain", 2, 24, "heads taken as 24"),
        ("dinov2_vits14_pretrain", 2, 6, "heads taken as 6"),
    ],
)
def test_heads_are_known_or_said_to_be_guessed(name: str, depth: int, heads: int, note: str, tmp_path: Path) -> None:
    path = file_of(name, checkpoint(name, depth=depth, device="meta"), tmp_path / "x.pth")
    vit, account, *_ = load_shapes(path)
    attn: Any = vit.blocks[0].attn
    assert attn.num_heads == heads
    assert ("heads taken as" in str(account)) == (note is not None)
    assert note is None or note in str(account)


@pytest.mark.parametrize(("width", "heads"), [(1152, 16), (1408, 16), (1664, 16), (1280, 16)])
def test_heads_of_a_width_are_those_of_published_models_in_every_family(width: int, heads: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = timm.create_model(
            "vit_base_patch14_dinov2", num_classes=0, depth=1, embed_dim=width, num_heads=heads, img_size=28
        )
        state = {**model.state_dict(), "mask_token": torch.zeros(1, width)}
    torch.save(state, tmp_path / "x.pth")
    vit, account, *_ = load_shapes(tmp_path / "x.pth")
    attn: Any = vit.blocks[0].attn
    assert attn.num_heads == heads
    assert f"heads taken as {heads}, as in published models of width {width}" in str(account)


@torch.no_grad()
def test_positions_are_resampled_by_the_official_rule_at_load(tmp_path: Path) -> None:
    """518 to 224 px: 37 patches a side to 16, stretched by 16.1 / 37, not antialiased."""
    tensors = checkpoint(S14, depth=1)
    vit, account, *_ = load(file_of(S14, tensors, tmp_path / "x.pth"), image_size=224)
    assert account is not None
    assert account.resampled == ("pos_embed",)
    grid = tensors["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    small = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic", antialias=False)
    assert vit.pos_embed is not None
    assert torch.equal(vit.pos_embed[:, :1], tensors["pos_embed"][:, :1])
    assert_close(vit.pos_embed[:, 1:], small.permute(0, 2, 3, 1).reshape(1, 256, 384), atol=1e-7, rtol=0)


def test_positions_follow_the_checkpoint_unless_said_otherwise(tmp_path: Path) -> None:
    for name, mode in ((S14, "official"), (REG, "timm")):
        path = file_of(name, checkpoint(name, depth=1), tmp_path / f"{name}.pth")
        assert load(path).vit.position_mode == mode
        for asked in ("timm", "official"):
            assert load(path, positions=asked).vit.position_mode == asked
