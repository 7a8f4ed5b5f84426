"""One ONNX graph: images in, class token and patch tokens out, any batch size."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from explora.errors import WeightsError
from explora.models.export import facts_of
from explora.models.exports.base import Content, Format, batch
from explora.models.vit import ViT
from explora.models.weights import METADATA_KEY


class Onnx(Format):
    """model.onnx, made by torch's exporter; weights above 2 GB lie beside it in model.onnx.data."""

    library = "onnx"

    def write(self, folder: Path, content: Content) -> None:
        for package in ("onnx", "onnxscript"):
            try:
                importlib.import_module(package)
            except ImportError:
                raise WeightsError(f"ONNX needs the package {package}: pip install 'explora[onnx]'") from None
        vit = content.vit
        images = torch.zeros(2, vit.channels, vit.image_size, vit.image_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about torch's internals
            program = torch.onnx.export(
                _Encoder(vit).eval(),
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=["cls", "patches"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces with this machine's paths
        program.model.metadata_props[METADATA_KEY] = json.dumps(facts_of(vit))
        program.save(folder / "model.onnx")

    def code(self, content: Content) -> str:
        return f"""\
import numpy as np
import onnxruntime

folder = "."  # where this file lies
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
{batch(content, numpy=True)}
cls, patches = session.run(["cls", "patches"], {{"images": images}})"""

    def limits(self, content: Content) -> list[str]:
        return [f"The batch is free, the image size is not: {content.vit.image_size} px."]


class _Encoder(nn.Module):
    """The backbone with one tensor in and two out."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit([images])[0]
        return tokens.cls_BD, tokens.patches_BND
