"""A folder that `transformers.AutoModel.from_pretrained` loads."""

from __future__ import annotations

import json
from pathlib import Path

from explora.bands import RGB
from explora.models.export import facts_of
from explora.models.exports.base import Content, Format, batch, levels, refuse_extended, write_safetensors
from explora.models.formats import huggingface
from explora.models.weights import METADATA_KEY


class HuggingFace(Format):
    """config.json, model.safetensors and preprocessor_config.json for `transformers`."""

    library = "transformers"

    def write(self, folder: Path, content: Content) -> None:
        refuse_extended(content.vit, "transformers")
        size = {"height": content.vit.image_size, "width": content.vit.image_size}
        preprocessor = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": 3,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(content.vit.mean),
            "image_std": list(content.vit.std),
        }
        config = {**huggingface.config(content.vit), METADATA_KEY: facts_of(content.vit)}
        write_safetensors(folder / "model.safetensors", huggingface.write(content.vit))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if content.vit.bands == RGB and levels(content.vit):  # all that its processors know
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")

    def code(self, content: Content) -> str:
        arguments = ", add_pooling_layer=False" if _pools(content) else ""
        return f"""\
import torch
from transformers import AutoModel

folder = "."  # where this file lies
model = AutoModel.from_pretrained(folder{arguments}).eval()
{batch(content)}
with torch.no_grad():
    tokens = model(images).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {content.vit.prefix_tokens} :]"""

    def limits(self, content: Content) -> list[str]:
        lines = [f"At sizes other than {content.vit.image_size} px transformers resamples positions by its own rule."]
        if _pools(content):
            lines.append(
                "transformers' ViTModel adds a pooling layer of random weights unless `add_pooling_layer=False`, and "
                "has no place for the mask token, which is left out."
            )
        return lines


def _pools(content: Content) -> bool:
    """Whether the class that `AutoModel` picks has a pooling layer of its own."""
    return huggingface.config(content.vit)["model_type"] == "vit"
