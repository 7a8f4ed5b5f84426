"""Every published checkpoint by its exact keys: recognised, inferred, loaded whole, equal to timm's conversion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import IMAGENET, META, NEEDS_KEYS, SATELLITES, checkpoint, doubt, file_of, load_shapes, named
from small_models import load
from torch import Tensor, nn
from torch.testing import assert_close

from explora.errors import WeightsError
from explora.models import Source, ViT, build
from explora.models.formats import dinov2
from explora.models.vit import timm
from explora.objectives.heads import DINOHead

BACKBONES = named("backbone", "encoder_decoder", "classifier", "training_teacher")
SMALL = [name for name in BACKBONES if META[name]["dim"] <= 768]
LICENCES = {"dinov2": "Apache-2.0", "dinov3": "DINOv3 License", "mae": "CC-BY-NC-4.0"}
UNUSED = {
    "dinov2": r"(dino|ibot)_head\.",
    "dinov3": r"rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask|local_cls_norm\.(weight|bias)",
    "mae": r"head\.(weight|bias)",
}
pytestmark = NEEDS_KEYS


def state(vit: ViT) -> dict[str, Tensor]:
    """What timm knows of."""
    return {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}


def timms(vit: ViT) -> nn.Module:
    """timm's own model of the architecture that was inferred."""
    plain = {"fc_norm": False} if vit.pos_embed is not None else {}
    size: dict[str, Any] = {"num_classes": 0, "global_pool": "token", "img_size": vit.image_size}
    return timm.create_model(vit.name.partition(".")[0], **size, **plain, **vit.options)


def as_timm_converts(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    eva = type(model).__name__ == "Eva"
    return (timm.models.eva if eva else timm.models.vision_transformer).checkpoint_filter_fn(dict(tensors), model)


# Every entry of the table


@pytest.mark.parametrize("name", BACKBONES)
def test_every_checkpoint_is_inferred_and_loads_whole(name: str, tmp_path: Path) -> None:
    """By shapes alone, so that 7B takes no memory; the values of small ones are compared below."""
    meta, tensors = META[name], checkpoint(name, device="meta")
    assert sum(tensor.numel() for tensor in tensors.values()) == meta["params"]
    file = tmp_path / meta["file"].split("/")[-1].split()[0]
    vit, account, decoder, _ = load_shapes(file_of(name, tensors, file))
    assert account is not None
    assert (vit.mean, vit.std) == (SATELLITES if "sat493m" in name else IMAGENET)
    # Releases have one mean; what was trained with DINOv2's code may have been trained on anything.
    assert account.notes == tuple(note for note in account.notes if note.startswith(("decoder: ", "fc_norm, "))) + (
        (doubt(vit),) if meta["kind"] == "training_teacher" else ()
    )
    missing = {"mask_token"} if meta["family"] == "mae" else set()
    assert set(account.missing) == missing
    assert account.total - account.loaded == len(missing) * vit.width
    assert account.resampled == account.fresh == ()
    assert all(re.match(UNUSED[meta["family"]], unused) for unused in account.unused)
    attn: Any = vit.blocks[0].attn
    assert (vit.width, vit.depth, attn.num_heads, vit.patch_size) == tuple(
        meta[key] for key in ("dim", "depth", "heads", "patch")
    )
    assert vit.prefix_tokens == 1 + meta.get("registers", 0)
    assert vit.image_size == meta.get("img", 256)
    official = meta["family"] == "dinov2" and not meta["registers"]
    assert vit.position_mode == ("official" if official else "timm")
    assert vit.source == Source(meta["family"], file.name, LICENCES[meta["family"]], inferred=True)
    count = sum("decoder" in key or key == "mask_token" for key in tensors) if meta["kind"] == "encoder_decoder" else 0
    assert len(decoder) == count
    assert account.loaded == meta["params"] - elsewhere(name, tensors)


def elsewhere(name: str, tensors: dict[str, Tensor]) -> int:
    """Elements of a checkpoint that are no backbone's, and of the class token's position where it is folded into it."""
    meta = META[name]
    pattern = r"decoder|.*_head\.|head\.|rope_embed|.*bias_mask|local_cls_norm"
    pattern += "|mask_token" if meta["kind"] == "encoder_decoder" else ""
    rest = sum(tensor.numel() for key, tensor in tensors.items() if re.match(pattern, key))
    if meta["family"] == "dinov3":  # the keys' third of each bias
        rest += sum(tensor.numel() // 3 for key, tensor in tensors.items() if key.endswith("qkv.bias"))
    return rest + meta["dim"] * (meta["family"] == "dinov2" and meta["registers"] > 0)


@pytest.mark.parametrize("name", SMALL)
def test_values_are_those_of_timms_own_conversion(name: str, tmp_path: Path) -> None:
    tensors = checkpoint(name, depth=99 if META[name]["dim"] == 384 else 3)
    vit, account, decoder, _ = load(file_of(name, tensors, tmp_path / "x.pth"))
    encoder = {key: tensor for key, tensor in tensors.items() if not re.match("decoder|head", key)}
    if META[name]["family"] == "mae":  # timm's conversion takes a decoder's mask token for DINOv2's
        expected = {key.replace("fc_norm", "norm"): encoder[key] for key in encoder if key != "mask_token"}
    else:
        assert torch.equal(vit.mask_token, tensors["mask_token"])
        expected = as_timm_converts(encoder, timms(vit))
    found = state(vit)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert account is not None
    assert all(torch.equal(decoder[key], tensors[key]) for key in decoder if key != "decoder_mask_token")
    if decoder:
        assert torch.equal(decoder["decoder_mask_token"], tensors["mask_token"])


@pytest.mark.parametrize("name", named("ssl_head"))
def test_published_head_names_are_those_of_our_head(name: str) -> None:
    tensors = checkpoint(name, device="meta")
    assert sum(tensor.numel() for tensor in tensors.values()) == META[name]["params"]
    hidden, width = tensors["mlp.0.weight"].shape
    bottleneck = tensors["mlp.4.bias"].shape[0]
    plain = META[name]["family"] == "dinov3"
    prototypes = tensors["last_layer.weight" if plain else "last_layer.weight_v"].shape[0]
    with torch.device("meta"):
        head = DINOHead(width, prototypes, hidden, bottleneck, 3)
    if plain:
        with pytest.raises(RuntimeError, match=r'Missing.*last_layer.weight_g[\s\S]*Unexpected.*"last_layer.weight"'):
            head.load_state_dict(tensors)
    else:
        head.load_state_dict(tensors)


@pytest.mark.parametrize("name", named("linear_head"))
def test_published_linear_heads_fit_the_features_they_were_trained_on(name: str, tmp_path: Path) -> None:
    meta, tensors = META[name], checkpoint(name, device="meta")
    assert sum(tensor.numel() for tensor in tensors.values()) == meta["params"]
    width = META[name.replace("linear_head", "pretrain").replace("linear4_head", "pretrain")]["dim"]
    with torch.device("meta"):
        nn.Linear((1 + meta["last_blocks"]) * width, 1000).load_state_dict(tensors)
    with pytest.raises(WeightsError, match=r"no backbone in these weights, perhaps a head alone: weight \(1000, "):
        load(file_of(name, tensors, tmp_path / meta["file"]))


# Wrappers and prefixes


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher", "student"])
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "_orig_mod.", "student.", "teacher.backbone.module."])
@pytest.mark.parametrize("chunks", [0, 4])
def test_every_wrapping_of_training_checkpoints(tmp_path: Path, wrapper: str, prefix: str, chunks: int) -> None:
    tensors = checkpoint("dinov2_vits14_reg4_pretrain", device="meta")
    wrapped = {prefix + chunked(name, chunks): tensor for name, tensor in tensors.items()}
    wrapped["dino_head.last_layer.weight_g"] = torch.empty(5, 1, device="meta")
    torch.save(wrapped if wrapper is None else {wrapper: wrapped, "epoch": 3}, tmp_path / "x.pth")
    vit, account, *_ = load_shapes(tmp_path / "x.pth")
    assert account is not None
    assert (vit.name, account.loaded) == ("vit_small_patch14_reg4_dinov2", account.total)
    assert account.unused == ("dino_head.last_layer.weight_g",)


def chunked(name: str, chunks: int) -> str:
    """`blocks.7.` to `blocks.2.7.`, three blocks a chunk, as DINOv2 trains."""
    return re.sub(r"^blocks\.(\d+)\.", lambda b: f"blocks.{int(b[1]) // 3}.{b[1]}.", name) if chunks else name


def test_chunked_blocks_keep_their_order(tmp_path: Path) -> None:
    tensors = checkpoint("dinov2_vits14_pretrain")
    file_of("dinov2_vits14_pretrain", tensors, tmp_path / "flat.pth")
    torch.save({chunked(name, 4): tensor for name, tensor in tensors.items()}, tmp_path / "chunked.pth")
    flat, deep = (load(tmp_path / f"{name}.pth").vit.state_dict() for name in ("flat", "chunked"))
    assert all(torch.equal(flat[name], deep[name]) for name in flat)


# What must not load


S14, REG, G14 = (f"dinov2_vit{size}_pretrain" for size in ("s14", "s14_reg4", "g14"))
DINOV3 = [f"dinov3_vits16{plus}_pretrain_lvd1689m" for plus in ("", "plus")]


@pytest.mark.parametrize(
    ("checkpoint_name", "model", "says"),
    [
        (REG, "vit_small_patch14_dinov2", "no place for: reg_token"),
        (S14, "vit_small_patch14_reg4_dinov2", "missing: reg_token"),
        (G14, "vit_base_patch14_dinov2", "no place for: blocks.12.norm1.weight, .* and [0-9]+ more"),
        ("dinov2_train_teacher_vitl14", "vit_large_patch14_dinov2", r"mlp.fc1.weight: \(5472, 1024\) in the file"),
        ("dinov2_train_teacher_vitl16_short", "vit_large_patch14_dinov2", r"patch_embed.proj.weight: .*16, 16\)"),
        (S14, "vit_base_patch14_dinov2", r"\(384,\) in the file, \(768,\) in the model"),
        (S14, "vit_small_patch16_224", "for images of 518 px, does not fit vit_small_patch16_224"),
        ("dinov2_train_teacher_vitl16_short", "vit_large_patch16_224", r"no place for: blocks.0.ls1.gamma"),
        ("mae_pretrain_vit_base", "vit_base_patch14_dinov2", "missing: blocks.0.ls1.gamma"),
        ("dinov3_vits16_pretrain_lvd1689m", "vit_small_patch16_dinov3", "no place for: blocks.0.attn.q_bias"),
        ("dinov3_vit7b16_pretrain_lvd1689m", "vit_huge_plus_patch16_dinov3_qkvb", "missing: blocks.0.attn.q_bias"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(tmp_path: Path, checkpoint_name: str, model: str, says: str) -> None:
    path = file_of(checkpoint_name, checkpoint(checkpoint_name, device="meta"), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=says):
        load_shapes(path, name=model)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.pop("blocks.7.mlp.fc1.bias"), "missing: blocks.7.mlp.fc1.bias"),
        (lambda t: t.pop("norm.weight"), "missing: norm.weight"),
        (lambda t: t.pop("patch_embed.proj.weight"), "patch_embed.proj.weight is not there"),
        (lambda t: t.update({"blocks.0.5.norm1.weight": t["norm.weight"]}), "two chunks hold the same block"),
        (lambda t: t.update({"dino_loss.center": t["norm.weight"]}), "no place for: dino_loss.center"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.3.")], r"missing: blocks\.3\."),
    ],
)
def test_a_spoilt_checkpoint_is_refused(tmp_path: Path, spoil: Any, says: str) -> None:
    tensors = checkpoint(S14, device="meta")
    spoil(tensors)
    with pytest.raises(WeightsError, match=says):
        load_shapes(file_of(S14, tensors, tmp_path / "x.pth"))


@pytest.mark.parametrize("name", [REG, *DINOV3, "mae_visualize_vit_base", "dinov2_train_teacher_vitl14"])
@pytest.mark.parametrize("shape", [None, (), (7,), (1, 7, 7)])
def test_any_tensor_missing_or_of_another_shape_is_a_user_error(name: str, shape: Any, tmp_path: Path) -> None:
    whole = checkpoint(name, depth=2, device="meta")
    free = r"mask_token|decoder|.*_head\.|.*bias_mask|rope_embed|local_cls_norm"
    free += "" if shape is not None else "|register_tokens|storage_tokens"  # without them it is a model that has none
    for key in [key for key in whole if not re.match(free, key.removeprefix("backbone."))]:
        tensors = {**whole, key: torch.empty(shape or (), device="meta")}
        if shape is None:
            del tensors[key]
        with pytest.raises(WeightsError):
            load_shapes(file_of(name, tensors, tmp_path / "x.pth"))


@pytest.mark.parametrize("kind", ["two wrappers", "one dictionary"])
def test_student_and_teacher_in_one_are_refused(tmp_path: Path, kind: str) -> None:
    tensors = checkpoint(S14, device="meta")
    both: Any = {"teacher": tensors, "student": tensors}
    if kind == "one dictionary":
        both = {"model": {f"{who}.backbone.{key}": value for who in both for key, value in tensors.items()}}
    torch.save(both, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="several models, such as student and teacher"):
        load_shapes(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("rope_embed.periods", lambda t: t * 2, "periods are not DINOv3's"),
        ("blocks.1.attn.qkv.bias_mask", lambda t: 1 - t, "keys have a bias or others have none"),
        ("blocks.1.attn.qkv.bias_mask", None, "keys have a bias or others have none"),
    ],
)
def test_a_dinov3_that_timms_class_is_not_is_refused(tmp_path: Path, key: str, change: Any, says: str) -> None:
    tensors = checkpoint("dinov3_vits16_pretrain_lvd1689m", depth=2)
    value = tensors.pop(key)
    if change:
        tensors[key] = change(value)
    torch.save(tensors, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=says):
        load(tmp_path / "x.pth")


# Forward passes


@pytest.mark.parametrize("name", [REG, S14, "mae_pretrain_vit_base", *DINOV3])
@torch.no_grad()
def test_tokens_are_those_of_timm(name: str, tmp_path: Path) -> None:
    tensors = checkpoint(name, depth=2)
    vit = load(file_of(name, tensors, tmp_path / "x.pth")).vit.eval()
    model = timms(vit)
    model.load_state_dict(tensors if META[name]["family"] == "mae" else as_timm_converts(tensors, model))
    images = torch.randn(2, 3, vit.image_size, vit.image_size)
    expected = model.eval().forward_features(images)
    tokens = vit([images])[0]
    assert_close(tokens.cls_BD, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert_close(tokens.patches_BND, expected[:, vit.prefix_tokens :], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_giant_gated_mlp_is_that_of_timm(tmp_path: Path) -> None:
    """DINOv2 g in official names (w12, w3), its first block, against timm's conversion and forward pass."""
    tensors = checkpoint(G14, depth=1)
    vit, account, *_ = load(file_of(G14, tensors, tmp_path / "x.pth"))
    theirs = timms(vit).eval()
    expected = as_timm_converts(tensors, theirs)
    found = state(vit)
    assert account is not None
    assert (account.loaded, account.missing, account.unused) == (account.total, (), ())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    theirs.load_state_dict(expected)
    images = torch.randn(1, 3, vit.image_size, vit.image_size)
    tokens = vit.eval()([images])[0]
    reference = theirs.forward_features(images)
    assert_close(tokens.cls_BD, reference[:, 0], atol=1e-4, rtol=1e-4)
    assert_close(tokens.patches_BND, reference[:, 1:], atol=1e-4, rtol=1e-4)


# DINOv2's own keys, written


@pytest.mark.parametrize("name", [S14, REG, "dinov2_train_teacher_vitl14"])
def test_dinov2_keys_come_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    tensors = checkpoint(name, depth=1)
    vit = load(file_of(name, tensors, tmp_path / "x.pth")).vit
    written = dinov2.write(vit)
    official = {
        re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key.removeprefix("backbone.")): tensor
        for key, tensor in tensors.items()
        if not re.match("(dino|ibot)_head", key)
    }
    assert written.keys() == official.keys()
    folded = {"cls_token", "pos_embed"} if "reg" in name else set()
    assert [key for key in written if key not in folded and not torch.equal(written[key], official[key])] == []
    # With registers the class token takes its position in, whose row is zero: the same sum.
    assert torch.equal(written["pos_embed"][:, 1:], official["pos_embed"][:, 1:])
    first, expected = (places["cls_token"] + places["pos_embed"][:, :1] for places in (written, official))
    assert torch.equal(first, expected)
    torch.save(written, tmp_path / "again.pth")
    again = load(tmp_path / "again.pth").vit
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in vit.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vit_tiny_patch16_224", {}, "needs blocks.0.ls1.gamma"),
        ("vit_base_patch16_clip_224", {"init_values": 1.0}, "has no place for norm_pre.weight"),
        ("vit_tiny_patch16_224", {"init_values": 1.0, "qk_norm": True}, "no place for blocks.0.attn.q_norm"),
        ("vit_tiny_patch16_224", {"init_values": 1.0, "class_token": False}, "needs cls_token"),
        ("vit_tiny_patch16_224", {"init_values": 1.0, "reg_tokens": 2}, "never for registers"),
    ],
)
def test_what_dinov2_cannot_hold_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(WeightsError, match=f"cannot be written as DINOv2, which .*{says}"):
        dinov2.write(build(name, 32, {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8, **options}))
