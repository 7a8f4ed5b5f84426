"""Hugging Face folders and files: read with equal tokens, written for AutoModel, bit-equal on every way back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import NAME, SIZE, load, same, scatter, tiny
from torch import Tensor
from torch.testing import assert_close

from explora.errors import WeightsError
from explora.models.formats import dinov2, huggingface

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
PLAIN = {**COMMON, "intermediate_size": 128, "layer_norm_eps": 1e-6}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2", {**COMMON, "mlp_ratio": 2}),
    "dinov2 swiglu": ("Dinov2", {**COMMON, "mlp_ratio": 4, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", {**COMMON, "mlp_ratio": 3, "num_register_tokens": 2}),
    "no bias": ("Dinov2", {**COMMON, "mlp_ratio": 2, "qkv_bias": False}),
    "vit": ("ViT", PLAIN),
    "mae": ("ViTMAE", {**PLAIN, **DECODER, "mask_ratio": 0.0}),
}


def theirs(kind: str, ending: str = "Model") -> Any:
    """A model of `transformers` whose every parameter is far from its initial value."""
    name, settings = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    return scatter(getattr(transformers, f"{name}{ending}")(config)).eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", ["folder", "pickle"])
@torch.no_grad()
def test_hugging_face_folders_give_the_same_tokens(kind: str, place: str, tmp_path: Path) -> None:
    model, images = theirs(kind), torch.randn(2, 3, SIZE, SIZE)
    model.save_pretrained(tmp_path)
    if place == "pickle":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    vit, account, decoder, _ = load(tmp_path)
    assert account is not None
    assert account.missing == (() if "embeddings.mask_token" in model.state_dict() else ("mask_token",))
    assert {name.partition(".")[0] for name in account.unused} <= {"pooler"}
    assert not decoder
    assert vit.source.format == f"huggingface/{model.config.model_type}"
    assert vit.position_mode == ("official" if model.config.model_type == "dinov2" else "timm")
    noise = {"noise": torch.arange(16.0).expand(2, -1)} if kind == "mae" else {}
    expected = model(images, **noise).last_hidden_state
    tokens = vit.eval()([images])[0]
    assert_close(tokens.cls_BD, expected[:, 0], atol=1e-5, rtol=1e-5)
    assert_close(tokens.patches_BND, expected[:, vit.prefix_tokens :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ending", ["ForPreTraining", "ForImageClassification"])
def test_hugging_face_heads_and_decoders_are_kept_apart(ending: str, tmp_path: Path) -> None:
    kind = "mae" if ending == "ForPreTraining" else "vit"
    model = theirs(kind, ending)
    model.save_pretrained(tmp_path)
    whole, account, decoder, _ = load(tmp_path)
    assert account is not None
    assert set(account.unused) <= {"classifier.weight", "classifier.bias"}
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(whole.norm.weight, saved["vit.layernorm.weight"])
    parts = [saved[f"vit.encoder.layer.1.attention.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(whole.state_dict()["blocks.1.attn.qkv.weight"], torch.cat(parts))
    assert bool(decoder) == (kind == "mae")
    if decoder:
        check_decoder(decoder, saved)


def check_decoder(decoder: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Names of an official `mae_visualize_*` file but for the mask token; every tensor of the decoder is there."""
    outer = {f"decoder_{name}.{kind}" for name in ("embed", "norm", "pred") for kind in ("weight", "bias")}
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = {f"decoder_blocks.{i}.{part}.{kind}" for i in (0, 1) for part in parts for kind in ("weight", "bias")}
    assert decoder.keys() == outer | blocks | {"decoder_mask_token", "decoder_pos_embed"}
    elements = sum(tensor.numel() for name, tensor in saved.items() if name.startswith("decoder."))
    assert sum(tensor.numel() for tensor in decoder.values()) == elements
    assert torch.equal(decoder["decoder_mask_token"], saved["decoder.mask_token"])
    assert torch.equal(decoder["decoder_pred.weight"], saved["decoder.decoder_pred.weight"])


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_single_file_cannot_say_its_heads(kind: str, tmp_path: Path) -> None:
    """It is read with a note, and whole once the config says them."""
    theirs(kind).save_pretrained(tmp_path)
    beside = load(tmp_path / "model.safetensors")
    assert "heads taken" not in str(beside.account)
    (tmp_path / "config.json").rename(tmp_path / "elsewhere.json")
    whole, account, *_ = load(tmp_path / "model.safetensors")
    assert (whole.width, whole.depth) == (64, 2)
    assert "heads taken as width / 64, unless model.options.num_heads says another number" in str(account)
    told = load(tmp_path / "model.safetensors", options={"num_heads": 2}).vit.eval()
    images = torch.randn(1, 3, SIZE, SIZE)
    assert_close(told([images])[0].cls_BD, beside.vit.eval()([images])[0].cls_BD)


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": False}, (0,) * 3, (1,) * 3),
        ({}, (0.5,) * 3, (0.5,) * 3),
    ],
)
@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_mean_and_std_are_those_of_the_preprocessor(
    preprocessor: dict[str, Any], mean: Any, std: Any, place: str, tmp_path: Path
) -> None:
    theirs("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    vit, account, *_ = load(tmp_path / place)
    assert (vit.mean, vit.std) == (mean, std)
    assert ("which mean and std" in str(account)) == (not preprocessor)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"image_mean": [1, 2, 3]}',
        '{"image_mean": "a", "image_std": "b"}',
        '{"image_mean": [1], "image_std": [0]}',
    ],
)
def test_a_damaged_preprocessor_is_refused(text: str, tmp_path: Path) -> None:
    theirs("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"preprocessor_config\.json: |image_mean and image_std are "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' is not read"),
        ({"model_type": "dinov3_vit"}, "model_type 'dinov3_vit' is not read; known: dinov2, "),
        ({"num_attention_heads": None}, "'num_attention_heads' is None, expected int"),
        ({"model_type": None}, "'model_type' is None, expected str"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    theirs("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=says):
        load(tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no Hugging Face folder"),
        ({"config.json": "{}"}, "no Hugging Face folder"),
        ({"config.json": "{}", "model.safetensors.index.json": "{}"}, "join sharded ones"),
        ({"config.json": "{", "model.safetensors": ""}, r"config\.json: damaged"),
        ({"config.json": "[]", "model.safetensors": ""}, "expected a mapping of keys"),
        ({"config.json": "{}", "model.safetensors": ""}, "damaged or no safetensors file"),
    ],
)
def test_a_folder_that_is_none_is_refused(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=says):
        load(tmp_path)


def test_a_third_without_the_others_is_named(tmp_path: Path) -> None:
    theirs("vit").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.1.attention.attention.key.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"missing: blocks\.1\.attn\.qkv\.weight[\s\S]*no place for: blocks\.1.*query"
    ):
        load(tmp_path)


# Written and read again


WRITTEN = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "wide": {"init_values": 0.5, "mlp_ratio": 6},
    "registers": {"init_values": 0.5, "reg_tokens": 3, "no_embed_class": True},
    "swiglu": {"name": "vit_giant_patch14_dinov2", "mlp_ratio": 5.5},
    "ten channels": {"init_values": 0.5, "in_chans": 10},
}


@pytest.mark.parametrize("kind", WRITTEN)
@torch.no_grad()
def test_hugging_face_keys_round_trip_and_load_with_automodel(kind: str, tmp_path: Path) -> None:
    vit = tiny(**WRITTEN[kind])
    keys, config = huggingface.write(vit), huggingface.config(vit)
    save_file(
        {name: tensor.contiguous() for name, tensor in keys.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(load(tmp_path).vit, vit, *["mask_token"] * (kind == "plain"))
    quiet = {"add_pooling_layer": False} if kind == "plain" else {}
    model, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, **quiet)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.randn(2, vit.channels, SIZE, SIZE)
    expected = model.eval()(images).last_hidden_state
    tokens = vit([images])[0]
    assert_close(tokens.cls_BD, expected[:, 0], atol=1e-5, rtol=1e-5)
    assert_close(tokens.patches_BND, expected[:, vit.prefix_tokens :], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in WRITTEN if kind != "plain"])
def test_dinov2_ours_and_hugging_face_are_bit_equal(kind: str, tmp_path: Path) -> None:
    vit = tiny(**WRITTEN[kind])
    torch.save(dinov2.write(vit), tmp_path / "official.pth")
    config = {"name": vit.name, "options": vit.options}
    from_official = load(tmp_path / "official.pth", **config).vit
    assert same(from_official, vit)
    (tmp_path / "config.json").write_text(json.dumps(huggingface.config(from_official)))
    torch.save(huggingface.write(from_official), tmp_path / "pytorch_model.bin")
    again = dinov2.write(load(tmp_path).vit)
    first = dinov2.write(vit)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("vit_base_patch16_clip_224", {}, "ViTModel, which has no place for norm_pre.weight"),
        (NAME, {"qk_norm": True}, "has no place for blocks.0.attn.q_norm.weight"),
        (NAME, {"reg_tokens": 2, "no_embed_class": True}, "no gated MLP and no registers"),
        (NAME, {"no_embed_class": True}, "positions for the class token"),
        (NAME, {"init_values": 1.0, "act_layer": "gelu_tanh"}, "has no MLP with GELUTanh"),
        ("vit_small_patch16_dinov3_qkvb", {}, "has no place for"),
        (NAME, {"init_values": 1.0, "mlp_ratio": 3.25}, "a whole number of widths, not 208 beside 64"),
        ("vit_giant_patch14_dinov2", {"mlp_ratio": 5.0}, "SwiGLU has no hidden width 160"),
    ],
)
def test_what_no_class_fits_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(WeightsError, match=says):
        huggingface.config(tiny(name, **options))
