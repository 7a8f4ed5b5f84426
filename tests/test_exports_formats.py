"""Exports for timm, transformers and DINOv2: the code on the card gives our features; every round trip is bit-equal."""

from __future__ import annotations

import json
import logging
from itertools import permutations
from pathlib import Path

import pytest
import torch
from stage_folder import KINDS, SIZE, encoded, follow, images, stage, tiny
from torch import Tensor
from torch.testing import assert_close

import explora
from explora.adapt import ExPLoRA
from explora.errors import RunError, WeightsError
from explora.models import ModelConfig, ViT, build, load_model, read_tensors
from explora.models.export import save_backbone
from explora.models.exports import FORMATS
from explora.models.vit import timm

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


def reread(path: Path, like: ViT) -> ViT:
    config = ModelConfig(name=like.name, options=like.options, image_size=SIZE, weights=str(path))
    return load_model(config).vit.eval()


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


PAIRS = list(permutations(("own", "timm", "huggingface", "dinov2"), 2))


@pytest.mark.parametrize(("first", "second", "kind"), [(*pair, kind) for pair in PAIRS for kind in kinds(*pair)])
def test_round_trips_are_bit_equal(tmp_path: Path, kind: str, first: str, second: str) -> None:
    vit = tiny(kind)
    once = reread(written(vit, first, tmp_path / "once"), vit)
    twice = reread(written(once, second, tmp_path / "twice"), vit)
    pair = (first, second)
    same(twice, vit, without_mask_token="timm" in pair or (kind == "plain" and "huggingface" in pair))


def same(found: ViT, expected: ViT, *, without_mask_token: bool) -> None:
    left: dict[str, Tensor] = dict(found.state_dict())
    for name, tensor in expected.state_dict().items():
        other = left.pop(name)
        assert torch.equal(other, tensor) or (without_mask_token and name == "mask_token"), name
    assert not left


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
