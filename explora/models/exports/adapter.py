"""Only what was trained, as explora itself reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

from explora.models.exports.base import Content, Format, batch, reading


class Adapter(Format):
    """adapter.safetensors, which `explora.adapt.attach` puts on the source weights."""

    library = "explora"
    needs_adapter = True

    def write(self, folder: Path, content: Content) -> None:
        assert content.adapter is not None
        shutil.copyfile(content.adapter, folder / "adapter.safetensors")

    def code(self, content: Content) -> str:
        return f"""\
import torch
from explora.adapt import attach
from explora.models import ModelConfig, load_model

folder = "."  # where this file lies
source = {content.source!r}  # the weights that training started from
model = {reading(content.vit, "source", content.source_options)}
attach(model, f"{{folder}}/adapter.safetensors")
{batch(content)}
with torch.no_grad():
    tokens = model([images])[0]
cls, patches = tokens.cls_BD, tokens.patches_BND"""

    def limits(self, content: Content) -> list[str]:
        return [f"{source_needed(content)} `attach` refuses any other."]


def source_needed(content: Content) -> str:
    """What a reader must have beside the folder, as a sentence."""
    if content.source is None:
        return "Training started from random weights, which are not in this folder."
    what = "the weights that timm downloads are" if content.source == "timm" else f"`{content.source}` is"
    return f"The source weights are not in this folder: {what} needed."
