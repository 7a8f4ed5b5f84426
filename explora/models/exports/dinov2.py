"""A state dict under the keys of the official DINOv2 repository."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from explora.models.export import facts_of
from explora.models.exports.base import Content, Format, batch, reading
from explora.models.files import SIDECAR
from explora.models.formats import dinov2


class DINOv2Keys(Format):
    """model.pth, a flat dict of tensors, which `weights_only=True` reads; explora.json says what they cannot."""

    library = "pytorch"

    def write(self, folder: Path, content: Content) -> None:
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in dinov2.write(content.vit).items()}
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        (folder / "model.pth").write_bytes(buffer.getbuffer())
        (folder / SIDECAR).write_text(json.dumps(facts_of(content.vit), indent=2) + "\n")

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

    def limits(self, content: Content) -> list[str]:
        return [
            "model.pth cannot say its licence, mean, std or how positions are resampled: keep explora.json beside it, "
            "which explora reads."
        ]
