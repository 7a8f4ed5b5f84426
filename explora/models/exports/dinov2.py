"""A state dict under the keys of the official DINOv2 repository."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from explora.models.exports.base import Content, Format, batch, reading
from explora.models.formats import dinov2


class DINOv2Keys(Format):
    """model.pth: a flat dict of tensors, which `weights_only=True` reads."""

    library = "pytorch"

    def write(self, folder: Path, content: Content) -> None:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in dinov2.write(content.vit).items()}
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        (folder / "model.pth").write_bytes(buffer.getbuffer())

    def code(self, content: Content) -> str:
        return f"""\
import torch
from explora.models import ModelConfig, load_model

folder = "."  # where this file lies
# In the official repository: model.load_state_dict(torch.load(f"{{folder}}/model.pth", weights_only=True))
model = {reading(content.vit, 'f"{folder}/model.pth"')}
{batch(content)}
with torch.no_grad():
    tokens = model([images])[0]
cls, patches = tokens.cls_BD, tokens.patches_BND"""
