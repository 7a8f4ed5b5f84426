"""Bands and scaling in every export: read back as they were, told by the card, obeyed by the code on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stage_folder import SIZE, encoded, follow, stage, tiny
from torch.testing import assert_close

import explora
from explora.adapt import ExPLoRA
from explora.bands import RGB, SENTINEL2, Scaling
from explora.models import ModelConfig, ViT, load_model
from explora.models.export import facts_of, save_backbone
from explora.models.exports import FORMATS

ALL = tuple(SENTINEL2)
METHOD = ExPLoRA(rank=2, alpha=4)
SCALING = Scaling(unit="reflectance", low=(0.125,) * 13, high=tuple(0.5 + n / 16 for n in range(13)))


def wide(folder: Path) -> tuple[ViT, Path]:
    """A model of thirteen bands and the RGB weights that it was inflated from."""
    source = save_backbone(folder / "rgb.safetensors", tiny("layerscale"))
    vit = load_model(ModelConfig(weights=str(source), bands=ALL)).vit.eval()
    vit.mean, vit.std, vit.scaling = (0.25,) * 13, (0.5,) * 13, SCALING
    return vit, source


@pytest.mark.parametrize("format", FORMATS)
def test_the_code_on_the_card_scales_as_the_model_was_taught(tmp_path: Path, format: str) -> None:
    source, rgb = wide(tmp_path)
    vit = stage(tmp_path / "run", source, METHOD)
    out = explora.export(tmp_path / "run", tmp_path / "out", format)  # type: ignore[arg-type]
    said = follow(out, source=rgb)
    values, images = torch.as_tensor(said["values"]), torch.as_tensor(said["images"])
    assert values.shape == (2, 13, SIZE, SIZE)
    low, high = (torch.tensor(ends)[:, None, None] for ends in (SCALING.low, SCALING.high))
    assert_close(images, (((values - low) / (high - low)).clamp(0, 1) - 0.25) / 0.5)
    for ours, name in zip(encoded(vit, images), ("cls", "patches"), strict=True):
        assert_close(torch.as_tensor(said[name]), ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())
    text = (out / "README.md").read_text()
    assert f"| bands | {', '.join(ALL)} |" in text
    assert "| units | reflectance; low to high becomes 0 to 1, what is beyond is clipped, minus mean" in text
    assert "| B02 | 0.125 | 0.5625 |" in text
    assert "Image transforms of other libraries are made for 8-bit RGB" in text


@pytest.mark.parametrize(("format", "file"), [("timm", "model.safetensors"), ("huggingface", "."), ("dinov2", ".")])
def test_bands_and_scaling_come_back(tmp_path: Path, format: str, file: str) -> None:
    vit, _ = wide(tmp_path)
    own = save_backbone(tmp_path / "own.safetensors", vit)
    out = explora.export(own, tmp_path / "out", format)  # type: ignore[arg-type]
    for path in (own, out / file):
        found = load_model(ModelConfig(weights=str(path))).vit
        assert (found.bands, found.scaling, found.mean) == (ALL, SCALING, vit.mean)
        assert facts_of(found) == facts_of(vit)
    assert not (out / "preprocessor_config.json").exists()


def test_onnx_says_what_it_is(tmp_path: Path) -> None:
    import onnxruntime

    vit, _ = wide(tmp_path)
    out = explora.export(save_backbone(tmp_path / "own.safetensors", vit), tmp_path / "out", "onnx")
    said = onnxruntime.InferenceSession(out / "model.onnx").get_modelmeta().custom_metadata_map["explora"]
    assert json.loads(said) == facts_of(vit)


@pytest.mark.parametrize(
    ("bands", "scaling", "told"),
    [
        (RGB, None, True),
        (RGB, Scaling(unit="level", low=(0, 0, 0), high=(1, 1, 1)), True),
        (RGB, Scaling(unit="dn", low=(0, 0, 0), high=(1, 1, 1)), False),
        (RGB[::-1], None, False),
    ],
)
def test_processors_are_told_of_8_bit_rgb_alone(
    tmp_path: Path, bands: tuple[str, ...], scaling: Scaling | None, told: bool
) -> None:
    vit = tiny("layerscale", bands=bands)
    vit.scaling = scaling
    out = explora.export(save_backbone(tmp_path / "own.safetensors", vit), tmp_path / "out", "huggingface")
    assert (out / "preprocessor_config.json").exists() == told
    text = (out / "README.md").read_text()
    assert ("Image transforms of other libraries" not in text) == told
    assert ("  # your images, the bands B02, B03, B04\n" in text) == (bands != RGB)
