"""Exports for timm, transformers and DINOv2: the code on the card gives our features; every round trip is bit-equal."""

from __future__ import annotations

import json
import logging
import os
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_folder import KINDS, SIZE, encoded, follow, images, stage, tiny
from torch import Tensor
from torch.testing import assert_close

import explora
from explora.adapt import ExPLoRA
from explora.errors import RunError, WeightsError
from explora.models import ModelConfig, ViT, build, load_model, read_tensors
from explora.models.export import facts_of, save_backbone
from explora.models.exports import FORMATS
from explora.models.vit import timm
from explora.models.weights import Source

METHOD = ExPLoRA(rank=2, alpha=4, mask_token=True)
FILES = {"timm": "model.safetensors", "huggingface": ".", "dinov2": "model.pth"}
FITS = {"dinov2": ("layerscale", "registers", "swiglu"), "huggingface": ("plain", "layerscale", "registers", "swiglu")}
"""Models that a format can hold where it cannot hold all."""


def kinds(*formats: str) -> list[str]:
    return [kind for kind in KINDS if all(kind in FITS.get(name, KINDS) for name in formats)]


def written(vit: ViT, format: str, out: Path) -> Path:
    """The file or folder that a reader of this format is given."""
    save_backbone(out.parent / f"{out.name}.safetensors", vit)
    if format == "own":
        return out.parent / f"{out.name}.safetensors"
    return explora.export(out.parent / f"{out.name}.safetensors", out, format) / FILES[format]  # type: ignore[arg-type]


def reread(path: Path) -> ViT:
    return load_model(ModelConfig(weights=str(path))).vit.eval()


@pytest.mark.parametrize(("format", "kind"), [(f, k) for f in ("timm", "huggingface", "dinov2") for k in kinds(f)])
def test_the_code_on_the_card_gives_our_features(tmp_path: Path, format: str, kind: str) -> None:
    vit = stage(tmp_path / "run", tiny(kind), METHOD)
    out = explora.export(tmp_path / "run", tmp_path / "out", format)  # type: ignore[arg-type]
    found = follow(out)
    given = torch.as_tensor(found["images"])
    assert given.shape[1:] == (3, SIZE, SIZE)
    assert given.std() > 0.5
    for ours, name in zip(encoded(vit, given), ("cls", "patches"), strict=True):
        assert_close(torch.as_tensor(found[name]), ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_timm_takes_every_tensor_and_no_other(tmp_path: Path, kind: str) -> None:
    vit = tiny(kind)
    out = written(vit, "timm", tmp_path / "out")
    model = timm.create_model(f"local-dir:{out.parent}", pretrained=True)
    theirs, ours = model.state_dict(), vit.state_dict()
    assert theirs.keys() == ours.keys() - {"mask_token"}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    settings = timm.data.resolve_model_data_config(model)
    assert tuple(settings["input_size"]) == (3, SIZE, SIZE)
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (vit.mean, vit.std)


@pytest.mark.parametrize("kind", kinds("huggingface"))
def test_transformers_misses_nothing_and_has_nothing_left(tmp_path: Path, kind: str) -> None:
    from transformers import AutoImageProcessor, AutoModel

    vit = tiny(kind)
    out = written(vit, "huggingface", tmp_path / "out")
    plain = {"add_pooling_layer": False} if kind == "plain" else {}
    model, report = AutoModel.from_pretrained(out, output_loading_info=True, **plain)
    assert not any(report.values())
    tokens = model.eval()(images()).last_hidden_state
    cls, patches = encoded(vit, images())
    assert_close(tokens[:, 0], cls, rtol=1e-5, atol=1e-5 * cls.abs().max().item())
    assert_close(tokens[:, vit.prefix_tokens :], patches, rtol=1e-5, atol=1e-5 * patches.abs().max().item())
    processor = AutoImageProcessor.from_pretrained(out)
    pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8).numpy()
    expected = (torch.tensor(pixels).permute(2, 0, 1) / 255 - torch.tensor(vit.mean).view(-1, 1, 1)) / torch.tensor(
        vit.std
    ).view(-1, 1, 1)
    assert_close(processor(pixels, return_tensors="pt")["pixel_values"][0], expected)


UNLIKELY = {"registers": "official", "plain": "official"}
"""How positions are resampled, where that is not `timm`: never as a reader would infer."""
PAIRS = list(permutations(("own", "timm", "huggingface", "dinov2"), 2))


@pytest.mark.parametrize(("first", "second", "kind"), [(*pair, kind) for pair in PAIRS for kind in kinds(*pair)])
def test_round_trips_are_bit_equal(tmp_path: Path, kind: str, first: str, second: str) -> None:
    vit = tiny(kind, positions=UNLIKELY.get(kind, "timm"))
    vit.mean, vit.std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.625)
    vit.source = Source("mae", "uni.bin", "CC-BY-NC-ND-4.0", inferred=kind == "plain")
    once = reread(written(vit, first, tmp_path / "once"))
    twice = reread(written(once, second, tmp_path / "twice"))
    pair = (first, second)
    same(twice, vit, without_mask_token="timm" in pair or (kind == "plain" and "huggingface" in pair))


def same(found: ViT, expected: ViT, *, without_mask_token: bool) -> None:
    left: dict[str, Tensor] = dict(found.state_dict())
    for name, tensor in expected.state_dict().items():
        other = left.pop(name)
        assert torch.equal(other, tensor) or (without_mask_token and name == "mask_token"), name
    assert not left
    assert facts_of(found) == facts_of(expected)
    assert (found.mean, found.std, found.source) == (expected.mean, expected.std, expected.source)
    assert heads(found) == heads(expected)


def heads(vit: ViT) -> list[int]:
    blocks: Any = vit.blocks
    return [block.attn.num_heads for block in blocks]


ODD: list[tuple[str, dict[str, Any], str]] = [
    ("layerscale", {"norm_layer": "rmsnorm"}, r"needs blocks\.0\.norm1\.bias.*has LayerNorm.*RmsNorm"),
    ("layerscale", {"proj_bias": False}, r"needs blocks\.0\.attn\.proj\.bias, blocks\.0\.mlp"),
    ("layerscale", {"qkv_bias": False}, r"needs blocks\.0\.attn\.qkv\.bias"),
    ("layerscale", {"final_norm": False}, r"needs norm\.weight, norm\.bias"),
    ("layerscale", {"act_layer": "gelu_tanh"}, "has no MLP with GELUTanh"),
    ("layerscale", {"qk_norm": True}, r"has no place for blocks\.0\.attn\.q_norm"),
    ("plain", {"norm_layer": "rmsnorm"}, r"has LayerNorm where this model has RmsNorm"),
    ("plain", {"proj_bias": False}, r"needs blocks\.0\.attn\.proj\.bias"),
    ("plain", {"final_norm": False}, r"needs norm\.weight, norm\.bias"),
    ("plain", {"class_token": False}, "needs cls_token"),
]


@pytest.mark.parametrize(
    ("format", "kind", "options", "says"),
    [("huggingface", *odd) for odd in ODD] + [("dinov2", *odd) for odd in ODD if odd[0] != "plain"],
    ids=lambda value: str(value)[:40],
)
def test_what_a_class_cannot_hold_is_refused(
    tmp_path: Path, format: str, kind: str, options: dict[str, Any], says: str
) -> None:
    name, size = KINDS[kind]
    vit = build(name, SIZE, {**size, **options}).eval()
    with pytest.raises(WeightsError, match=rf"cannot be written as .*{says}"):
        written(vit, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_timms_own_class_of_the_same_activation_is_held(tmp_path: Path) -> None:
    name, size = KINDS["layerscale"]
    vit = build(name, SIZE, {**size, "act_layer": "gelu"}).eval()
    vit.source = Source("dinov2", "a.pth", "Apache-2.0", inferred=False)
    same(reread(written(vit, "huggingface", tmp_path / "out")), vit, without_mask_token=False)


def test_what_a_format_has_no_place_for_lies_beside(tmp_path: Path) -> None:
    from transformers import AutoConfig

    vit = tiny("layerscale")
    vit.source = Source("dinov2", "a.pth", "CC-BY-NC-4.0", inferred=True)
    facts = facts_of(vit)
    assert facts["mean"] == list(vit.mean)
    assert facts["source"] == {"format": "dinov2", "file": "a.pth", "licence": "CC-BY-NC-4.0", "inferred": True}
    assert AutoConfig.from_pretrained(written(vit, "huggingface", tmp_path / "hf")).explora == facts
    assert json.loads((written(vit, "dinov2", tmp_path / "dinov2").parent / "explora.json").read_text()) == facts
    assert read_tensors(written(vit, "timm", tmp_path / "timm"))[1] == facts


@pytest.mark.parametrize("format", ["timm", "huggingface", "dinov2"])
def test_a_folder_of_others_can_be_exported(tmp_path: Path, format: str) -> None:
    vit = tiny("layerscale")
    vit.source = Source("dinov2", "a.pth", "Apache-2.0", inferred=False)
    given = written(vit, format, tmp_path / "given")
    given = given.parent if given.is_file() else given
    out = explora.export(given, tmp_path / "out", "huggingface")
    same(reread(out), vit, without_mask_token=format == "timm")
    with pytest.raises(RunError, match="holds what was trained, not a backbone"):
        explora.export(given, tmp_path / "new", "peft")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no backbone\.safetensors here.*a folder with config\.json"):
        explora.export(tmp_path / "empty", tmp_path / "new")


def test_the_account_names_the_mask_token_that_timm_has_no_place_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vit = tiny()
    with caplog.at_level(logging.INFO, "explora"):
        out = written(vit, "timm", tmp_path / "out")
    assert "timm has no place for the mask token" in caplog.text
    account = load_model(ModelConfig(weights=str(out))).account
    assert account is not None
    assert account.missing == ("mask_token",)


def test_a_plain_vit_has_no_place_in_dinov2(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot be written as DINOv2.*ls1"):
        written(tiny(), "dinov2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("format", ["timm", "huggingface", "dinov2"])
def test_channel_groups_have_no_place_elsewhere(tmp_path: Path, format: str) -> None:
    vit = build("vit_tiny_patch16_224", SIZE, {**KINDS["plain"][1], "in_chans": 4}, channel_groups=((0, 1), (2, 3)))
    with pytest.raises(WeightsError):
        written(vit, format, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dinov2_file_is_flat_and_holds_tensors_only(tmp_path: Path) -> None:
    path = written(tiny("registers"), "dinov2", tmp_path / "out")
    content = torch.load(path, weights_only=True)
    assert all(isinstance(tensor, Tensor) for tensor in content.values())
    assert {"register_tokens", "mask_token", "blocks.0.ls1.gamma"} <= content.keys()
    assert path.stat().st_size < 2 * sum(tensor.nbytes for tensor in content.values())


def test_our_file_keeps_the_mask_token_and_says_everything(tmp_path: Path) -> None:
    vit = tiny("layerscale", positions="official")
    path = save_backbone(tmp_path / "backbone.safetensors", vit)
    tensors, facts = read_tensors(path)
    assert torch.equal(tensors["mask_token"], vit.mask_token)
    assert facts["positions"] == "official"
    again = load_model(ModelConfig(weights=str(path))).vit
    assert (again.position_mode, again.name, again.options) == ("official", vit.name, vit.options)


def test_every_format_is_offered(explora_command) -> None:
    answer = explora_command("export", "--help")
    assert all(name in answer.out for name in FORMATS)


def test_what_a_killed_export_left_is_in_nobodys_way(tmp_path: Path) -> None:
    save_backbone(tmp_path / "x.safetensors", tiny())
    left = tmp_path / f".out.{os.getpid()}.tmp"
    left.mkdir()
    out = explora.export(tmp_path / "x.safetensors", tmp_path / "out")
    (tmp_path / "made").mkdir()
    assert out.stat().st_mode == (tmp_path / "made").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "made", "out", "x.safetensors"]


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    stage(tmp_path / "run", tiny(), METHOD)
    (tmp_path / "out").mkdir()
    for place in (tmp_path / "out", tmp_path / "run"):
        with pytest.raises(RunError, match="exists already; give the name of a new folder"):
            explora.export(tmp_path / "run", place)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_there_is_said(tmp_path: Path, format: str) -> None:
    with pytest.raises(RunError, match="give the folder of a finished pretrain or finetune stage"):
        explora.export(tmp_path, tmp_path / "new" / "out", format)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    config = json.dumps({"format": format})
    (tmp_path / "x.safetensors").write_text(config)
    with pytest.raises((RunError, WeightsError)):
        explora.export(tmp_path / "x.safetensors", tmp_path / "new" / "out", format)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
