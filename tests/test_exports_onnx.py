"""The ONNX export: the same outputs in onnxruntime, for any batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from stage_folder import SIZE, encoded, follow, images, stage, tiny
from torch.testing import assert_close

import explora
from explora.adapt import LoRA
from explora.errors import WeightsError
from explora.models import build
from explora.models.export import save_backbone


@pytest.mark.parametrize("kind", ["swiglu", "dinov3"])
def test_onnxruntime_gives_our_outputs_for_any_batch(tmp_path: Path, kind: str) -> None:
    import onnxruntime

    vit = stage(tmp_path / "run", tiny(kind), LoRA(rank=2))
    out = explora.export(tmp_path / "run", tmp_path / "out", "onnx")
    said = follow(out)
    for theirs, ours in zip((said["cls"], said["patches"]), encoded(vit, torch.tensor(said["images"])), strict=True):
        assert_close(torch.tensor(theirs), ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())
    assert b"stack_trace" not in (out / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert [(one.name, one.shape[1:]) for one in session.get_outputs()] == [("cls", [48]), ("patches", [16, 48])]
    for batch in (1, 5):
        found = session.run(None, {"images": images(batch).numpy()})
        for theirs, ours in zip(found, encoded(vit, images(batch)), strict=True):
            assert_close(torch.tensor(theirs), ours, rtol=1e-4, atol=1e-5 * ours.abs().max().item())


def test_channel_groups_are_exported(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    options = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "in_chans": 4}
    vit = build("vit_tiny_patch16_224", SIZE, options, channel_groups=((0, 1), (2, 3))).eval()
    save_backbone(tmp_path / "x.safetensors", vit)
    out = explora.export(tmp_path / "x.safetensors", tmp_path / "out", "onnx")
    batch = torch.randn(3, 4, SIZE, SIZE)
    found = onnxruntime.InferenceSession(out / "model.onnx").run(None, {"images": batch.numpy()})
    for theirs, ours in zip(found, encoded(vit, batch), strict=True):
        assert_close(torch.tensor(theirs), ours, rtol=1e-4, atol=1e-4)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(tmp_path / "run", tiny(), LoRA(rank=2))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(WeightsError, match=r"ONNX needs the package onnxscript: pip install 'explora\[onnx\]'"):
        explora.export(tmp_path / "run", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
