"""A folder that `timm.create_model("local-dir:...", pretrained=True)` loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from explora.errors import WeightsError
from explora.models.export import facts_of
from explora.models.exports.base import Content, Format, batch, refuse_extended, write_safetensors
from explora.models.vit import ViT
from explora.models.weights import METADATA_KEY


class Timm(Format):
    """The merged backbone under timm's names: config.json and model.safetensors, as the hub lays them out."""

    library = "timm"

    def write(self, folder: Path, content: Content) -> None:
        vit = content.vit
        arguments = timm_arguments(vit)
        fixed = vit.pos_embed is not None and not arguments.get("dynamic_img_size", False)
        config = {
            "architecture": vit.name.partition(".")[0],
            "num_classes": 0,
            "num_features": vit.width,
            "model_args": {name: value for name, value in arguments.items() if name != "num_classes"},
            "pretrained_cfg": {
                "num_classes": 0,
                "input_size": [vit.channels, vit.image_size, vit.image_size],
                "fixed_input_size": fixed,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "mean": list(vit.mean),
                "std": list(vit.std),
                "first_conv": "patch_embed.proj",
                "classifier": "head",
                "license": content.licence,
            },
        }
        tensors = {name: tensor for name, tensor in vit.state_dict().items() if name != "mask_token"}
        write_safetensors(folder / "model.safetensors", tensors, {METADATA_KEY: json.dumps(facts_of(vit))})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def code(self, content: Content) -> str:
        return f"""\
import timm
import torch

folder = "."  # where this file lies
model = timm.create_model(f"local-dir:{{folder}}", pretrained=True).eval()
{batch(content)}
with torch.no_grad():
    tokens = model.forward_features(images)
    cls, patches = model.forward_head(tokens), tokens[:, model.num_prefix_tokens :]"""

    def limits(self, content: Content) -> list[str]:
        lines = ["timm has no place for the mask token, which is left out: pretraining begins with a new one."]
        if content.vit.position_mode == "official":
            lines.append(
                f"At sizes other than {content.vit.image_size} px timm resamples positions by its own rule "
                "(antialiased), not by the official one of these weights; at that size nothing is resampled."
            )
        return lines


def timm_arguments(vit: ViT) -> dict[str, Any]:
    """What `timm.create_model` takes, beside the name, to make the same plain model.

    Raises:
        WeightsError: timm cannot make it.
    """
    refuse_extended(vit, "timm")
    if vit.channel_groups is not None:
        raise WeightsError(
            "timm, Hugging Face and DINOv2 know no channel groups; take backbone.safetensors itself, or --format onnx"
        )
    plain: dict[str, Any] = {"num_classes": 0, "global_pool": "avg" if vit.cls_token is None else "token"}
    norm = "fc_norm" if vit.rope is None else "use_fc_norm"  # timm's Eva, which DINOv3 is, calls it so
    return {**plain, norm: False, "img_size": vit.image_size, **vit.options}
