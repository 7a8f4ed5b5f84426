"""A state dict under the keys of the official DINOv2 repository."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from explora.models.export import facts_of
from explora.models.exports.base import Content, Format, batch, reading, refuse_extended
from explora.models.files import SIDECAR
from explora.models.formats import dinov2


class DINOv2Keys(Format):
    """model.pth, a flat dict of tensors, which `weights_only=True` reads; explora.json says what they cannot."""

    library = "pytorch"

    def write(self, folder: Path, content: Content) -> None:
        refuse_extended(content.vit, "DINOv2's layout")
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
        lines = [
            "model.pth cannot say its licence, mean, std or how positions are resampled: keep explora.json beside it, "
            "which explora reads."
        ]
        if "depth" in content.vit.options:
            lines.append(
                "The official repository's vit_small to vit_giant2 have depths of their own: these "
                f"{content.vit.depth} blocks need its DinoVisionTransformer with that depth."
            )
        return lines
